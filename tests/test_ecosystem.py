"""What torch offers around a model, on converted ones: checkpoints, parametrizations, precision, processes."""

import io

import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console
from systems import real_digits
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from vision import feature_extraction, timm, torchvision
from workers import run_and_change

import fastnn


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.fixture
def pair():
    return network(), fastnn.convert(network())


x, y = real_digits(8)


def step(model, call=None):
    """Loss, gradients and buffers of one training step."""
    model.zero_grad()
    loss = nn.functional.cross_entropy((call or model)(x), y)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()], list(model.buffers())


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations(pair, reentrant):
    plain, fast = pair

    def call(model):
        image = x.clone().requires_grad_()
        return lambda _: model[4:](checkpoint(model[:4], image, use_reentrant=reentrant))

    assert_same(step(fast, call(fast)), step(plain, call(plain)))


def test_deterministic_algorithms_forbid_nothing(pair):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(pair[1]), step(pair[1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first[1], second[1]))


def test_inference_mode(pair):
    plain, fast = (m.eval() for m in pair)
    with torch.inference_mode():
        assert_same(fast(x), plain(x))
        assert fast(x).is_inference()
    assert_same(step(fast)[1], step(plain)[1])  # nothing of it stays


LAYERS = {
    "linear": lambda f, t: f.linear(t(8, 16), torch.ones(4, 16), torch.ones(4)),
    "conv2d": lambda f, t: f.conv2d(t(1, 2, 6, 6), torch.ones(3, 2, 3, 3), torch.ones(3), 1, 1),
    "relu": lambda f, t: f.relu(t(3, 4)),
    "sigmoid": lambda f, t: f.sigmoid(t(3, 4)),
    "gelu": lambda f, t: f.gelu(t(3, 4), approximate="tanh"),
    "softmax": lambda f, t: f.softmax(t(3, 4), dim=1),
    "max_pool2d": lambda f, t: f.max_pool2d(t(1, 2, 6, 6), 2, 2, 0),
    "avg_pool2d": lambda f, t: f.avg_pool2d(t(1, 2, 6, 6), 2, 2, 0),
    "adaptive_avg_pool2d": lambda f, t: f.adaptive_avg_pool2d(t(1, 2, 6, 6), 1),
    "batch_norm": lambda f, t: f.batch_norm(t(4, 3), torch.zeros(3), torch.ones(3), training=True),
    "cross_entropy": lambda f, t: f.cross_entropy(t(4, 3), torch.zeros(4, dtype=torch.int64)),
}


class Lookup(torch.Tensor):
    """As quantised weights do: knows functions of torch by themselves, and their arguments by position."""

    calls = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not func.__module__ or not func.__module__.startswith("fastnn"), func
        if func is nn.functional.linear:
            cls.calls.append(len(args))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(a.as_subclass(torch.Tensor) if isinstance(a, Lookup) else a for a in args), **kwargs)


class Plain(torch.Tensor):
    pass


@pytest.mark.parametrize("name", LAYERS)
def test_classes_that_look_torchs_functions_up(name):
    def values(cls):
        return lambda *shape: torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).as_subclass(cls)

    call, functional = LAYERS[name], fastnn.functional
    expected = call(nn.functional, values(torch.Tensor))
    Lookup.calls.clear()
    assert_same(call(functional, values(Lookup)), expected)
    assert Lookup.calls == ([3] if name == "linear" else [])  # the bias among them, and by position
    fastnn._C.clear_fallbacks()
    plain = call(functional, values(Plain))
    assert type(plain) is Plain and not fastnn.fallbacks()
    assert_same(plain.as_subclass(torch.Tensor), expected)
    with torch.device("cpu"):  # a mode sees the calls too
        assert_same(call(functional, values(torch.Tensor)), expected)
    assert not fastnn.fallbacks()


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_without_kernels_are_torchs(inference):
    layer, dense = fastnn.Linear(4, 5).requires_grad_(False), torch.eye(3, 4)
    jagged = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    with torch.inference_mode(inference):
        for x in (dense.to_sparse(), dense.to_sparse_csr()):
            assert_same(layer(x), layer(dense))
            assert_same(fastnn.functional.mm(x, layer.weight.t()), torch.mm(dense, layer.weight.t()))
        assert_same(layer(jagged).unbind()[1], layer(torch.ones(3, 4)))
        assert layer.to("meta")(torch.empty(2, 3, 4, device="meta")).shape == (2, 3, 5)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_after_conversion(pair, name):
    for model in pair:
        torch.manual_seed(1)
        for layer in (model[0], model[8]):
            getattr(parametrizations, name)(layer)
    plain, fast = pair
    assert_same(step(fast), step(plain))
    keys = list(plain.state_dict())
    assert list(fast.state_dict()) == keys
    for model in pair:
        parametrize.remove_parametrizations(model[8], "weight")
    assert type(fast[8]) is fastnn.Linear
    assert_same(fast.eval()(x), plain.eval()(x))


def halve(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("apply", [nn.utils.weight_norm, nn.utils.spectral_norm, halve])
def test_rebuilt_by_hooks_after_conversion(pair, apply):
    for model in pair:
        torch.manual_seed(1)
        apply(model[0])
    assert_same(step(pair[1]), step(pair[0]))


def test_autocast_with_a_grad_scaler(pair):
    losses = []
    for model in pair:
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_settings_that_permit_less_precision_change_nothing(pair):
    """They allow torch to round products to bfloat16; fastnn computes float32 in float32."""
    expected = step(pair[1])[1]
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert all(map(torch.equal, step(pair[1])[1], expected))
    finally:
        torch.set_float32_matmul_precision(before)
    for backend in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
        before = backend.fp32_precision
        try:
            for precision in ("bf16", "tf32"):
                backend.fp32_precision = precision
                assert all(map(torch.equal, step(pair[1])[1], expected))
        finally:
            backend.fp32_precision = before


LOWERED = "linear mm bmm matmul addmm conv2d".split()
RAISED = "cross_entropy nll_loss".split()
RAISED_ON_CUDA = "softmax log_softmax".split()


def test_autocast_kernels_stand_where_torch_has_policies():
    """Products run in the lower precision, losses in float32, softmax on CUDA alone; nothing else is cast."""
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "fastnn::" in name}

    def with_kernel(key):
        return {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{n}", key)}

    assert with_kernel("AutocastCPU") == {*LOWERED, *RAISED}
    assert with_kernel("AutocastCUDA") == {*LOWERED, *RAISED, *RAISED_ON_CUDA}


def test_shared_memory_with_a_spawned_process(pair):
    model = pair[1].eval()
    expected, bias = model(x).detach(), model[8].bias.detach().clone()
    model.share_memory()
    result = torch.zeros(8, 10).share_memory_()
    process = mp.get_context("spawn").Process(target=run_and_change, args=(model, x, result))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert_same(result, expected)
    assert torch.equal(model[8].bias, bias + 1)


def test_memory_profile_names_the_operators(pair):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(pair[1])
    allocated = {e.key: e.cpu_memory_usage for e in profile.key_averages()}
    assert allocated["fastnn::conv2d"] > 0


# ---- subclasses of layers that have a twin -------------------------------------------------------------------------

SUBCLASSES = {
    "BatchNormAct2d": lambda: timm.layers.BatchNormAct2d(4),
    "Conv2dSame": lambda: timm.layers.Conv2dSame(4, 4, 3, stride=2),
    "StdConv2d": lambda: timm.layers.StdConv2d(4, 4, 3),
    "AvgPool2dSame": lambda: timm.layers.AvgPool2dSame(2, 2),
    "LayerNorm2d": lambda: timm.layers.LayerNorm2d(4),
    "FrozenBatchNorm2d": lambda: torchvision.ops.FrozenBatchNorm2d(4),
    "Conv2dNormActivation": lambda: torchvision.ops.Conv2dNormActivation(4, 4),
    "SqueezeExcitation": lambda: torchvision.ops.SqueezeExcitation(4, 2),
}


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "vit_b_32"])
def test_features_have_the_names_they_have_of_torchs(name):
    """torchvision's, who traces by a torch.fx of its own."""
    plain = torchvision.models.get_model(name)
    fast, names = fastnn.convert(plain, inplace=False), feature_extraction.get_graph_node_names
    assert names(fast) == names(plain)


def test_extracted_features_are_torchs():
    plain = torchvision.models.resnet18().eval()
    fast, image = fastnn.convert(plain, inplace=False), torch.randn(2, 3, 64, 64)
    wanted = ["layer1.0.relu_1", "layer2.1.conv1", "avgpool"]  # relu_1: the second call of one layer
    ours, theirs = (feature_extraction.create_feature_extractor(model, wanted)(image) for model in (fast, plain))
    assert_same(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", SUBCLASSES.values(), ids=SUBCLASSES)
def test_layers_of_timm_and_torchvision_run_unharmed(build):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), build(), nn.ReLU())
    fast = fastnn.convert(plain, inplace=False)
    left = type(plain[1])
    assert type(fast[1]) is left and type(fast[0]) is fastnn.Conv2d
    images = torch.randn(2, 3, 11, 11)
    for mode in (True, False):
        assert_same(fast.train(mode)(images), plain.train(mode)(images))
    rows = {r.name: r for r in fastnn.report(fast, console=Console(file=io.StringIO()))}
    assert rows["0"].native and rows["2"].native
    if issubclass(left, (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d)):
        assert not rows["1"].native and "subclass" in rows["1"].reason
