"""What users do to models besides training them: copy, save, hook, edit, freeze, trace, profile, load in workers."""

import copy
import inspect
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
from systems import ResidualBlock, SharedLayers, build, real_digits
from torch.utils.data import DataLoader, Dataset

import fastnn
from fastnn.convert import TWINS
from fastnn.train.model import MnistCnn


@pytest.fixture
def model():
    return MnistCnn(fastnn)


@pytest.fixture
def x():
    return real_digits(8)[0]


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_numpy_integers_are_integers(x):
    """Sizes computed by NumPy: torch takes them, and so do the kernels."""
    two, weight = numpy.int64(2), torch.randn(4, x.shape[1], 3, 3)
    for name, args in {"max_pool2d": (two,), "avg_pool2d": ((two, numpy.int32(3)),), "softmax": (two,)}.items():
        ours, torchs = (getattr(f, name)(x, *args) for f in (fastnn.functional, torch.nn.functional))
        torch.testing.assert_close(ours, torchs)
    ours, torchs = (f.conv2d(x, weight, None, two, (two, two)) for f in (fastnn.functional, torch.nn.functional))
    torch.testing.assert_close(ours, torchs)
    assert not fastnn.fallbacks()


# ---- classes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [twin.__name__ for twin in TWINS.values()])
def test_module_is_its_namesake_with_the_same_signatures(name):
    ours, theirs = getattr(fastnn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs) and ours.__name__ == theirs.__name__
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)


@pytest.mark.parametrize("name", [name for name in fastnn.optim.__all__ if hasattr(torch.optim, name)])
def test_optimizer_is_its_namesake_with_the_same_signatures(name):
    ours, theirs = getattr(fastnn.optim, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)


@pytest.mark.parametrize("name", fastnn.functional.__all__)
def test_function_has_the_namesakes_signature(name):
    ours, theirs = getattr(fastnn.functional, name), getattr(torch.nn.functional, name, None)
    try:
        expected = inspect.signature(theirs)
    except (TypeError, ValueError):
        return  # written in C: torch gives no signature to compare with
    names = [p.name for p in inspect.signature(ours).parameters.values()]
    if [p.kind for p in expected.parameters.values()][:1] != [inspect.Parameter.VAR_POSITIONAL]:
        assert names == list(expected.parameters)


def test_repr_and_constructors_are_torchs():
    assert repr(fastnn.Conv2d(3, 6, 3)) == repr(torch.nn.Conv2d(3, 6, 3))
    conv = fastnn.Conv2d(kernel_size=5, padding="same", in_channels=4, out_channels=8, groups=2, bias=False)
    assert conv(torch.randn(1, 4, 9, 9)).shape == (1, 8, 9, 9)
    assert fastnn.MaxPool2d(3, 2)(torch.randn(1, 1, 7, 7)).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("given", ["text", None, [1.0]], ids=str)
def test_a_layer_given_no_tensor_raises_torchs_error(given):
    texts = []
    for kind in (fastnn.Conv2d, torch.nn.Conv2d):
        with pytest.raises(TypeError) as error:
            kind(3, 6, 3)(given)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


# ---- copies and files ----------------------------------------------------------------------------------------------


def test_deepcopy_is_equal_and_independent(model, x):
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin.conv1.weight.data.zero_()
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_whole_model_to_a_file_and_back(model, x, how):
    if how == "pickle":
        back = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        back = torch.load(file, weights_only=False, map_location="cpu")
    assert type(back.conv1) is fastnn.Conv2d
    assert torch.equal(back(x), model(x))


def test_state_dict_goes_both_ways_through_a_file(x):
    plain, fast = SharedLayers(), fastnn.convert(SharedLayers())
    for a, b in ((plain, fast), (fast, plain)):
        torch.save(a.state_dict(), file := io.BytesIO())
        file.seek(0)
        b.load_state_dict(torch.load(file, map_location="cpu"))
        y = x.repeat(1, 3, 1, 1)[..., :25, :25]
        torch.testing.assert_close(b(y), a(y))


# ---- edits ---------------------------------------------------------------------------------------------------------


def test_weights_are_read_afresh_at_every_call(model, x):
    plain = MnistCnn(torch.nn)
    for edit in (
        lambda m: m.conv1.weight.data.fill_(0.02),
        lambda m: m.conv2.weight.data.copy_(torch.linspace(-1, 1, 5000).view(20, 10, 5, 5)),
        lambda m: setattr(m.fc.weight, "data", torch.linspace(-1, 1, 3200).view(10, 320)),
        lambda m: m.fc.bias.data.mul_(0).add_(3),
        lambda m: setattr(m.conv1.weight, "data", torch.linspace(-1, 1, 250).view(10, 1, 5, 5).flip(0).contiguous()),
    ):
        plain.load_state_dict(model.state_dict())
        before = model(x)
        for m in (model, plain):
            edit(m)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(model(x), before)


def test_sequential_edits(x):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    net[1] = fastnn.Linear(784, 5)
    net.add_module("activation", fastnn.ReLU())
    net.append(fastnn.Linear(5, 2))
    heads = torch.nn.ModuleDict({"a": net, "b": torch.nn.Sequential(net, fastnn.Softmax(dim=1))})
    torch.testing.assert_close(heads["b"](x), torch.softmax(heads["a"](x), 1))


def test_one_layer_used_twice():
    layer = fastnn.Linear(6, 6)
    x = torch.randn(3, 6, requires_grad=True)
    ours = torch.autograd.grad(layer(layer(x)).sum(), [x, layer.weight])
    linear = torch.nn.functional.linear
    twice = linear(linear(x, layer.weight, layer.bias), layer.weight, layer.bias)
    for a, b in zip(ours, torch.autograd.grad(twice.sum(), [x, layer.weight]), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_and_thawed_layers_with_two_learning_rates(model, x):
    groups = [{"params": model.conv1.parameters()}, {"params": model.fc.parameters(), "lr": 0.5}]
    optimizer = fastnn.optim.SGD(groups, lr=0.1)

    def changed():
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}

    fc, conv1 = {"fc.weight", "fc.bias"}, {"conv1.weight", "conv1.bias"}
    model.conv1.requires_grad_(False)
    assert changed() == fc
    assert model.conv1.weight.grad is None
    model.conv1.requires_grad_(True)
    assert changed() == fc | conv1


def test_gradient_of_the_input_alone(model, x):
    model.requires_grad_(False)
    plain = MnistCnn(torch.nn).requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    images = x.clone().requires_grad_()
    ours, theirs = (torch.autograd.grad(m(images).square().sum(), images)[0] for m in (model, plain))
    torch.testing.assert_close(ours, theirs)


def test_graphs_kept_alive_and_second_derivatives(model, x):
    plain = MnistCnn(torch.nn)
    plain.load_state_dict(model.state_dict())

    def penalty(m):
        images = x.double().requires_grad_()
        m.double()
        loss = m(images).square().mean()
        loss += m(images.flip(0)).abs().mean()
        first = torch.autograd.grad(loss, images, create_graph=True, retain_graph=True)[0]
        (loss + first.square().sum()).backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in m.parameters()]

    for a, b in zip(penalty(model), penalty(plain), strict=True):
        torch.testing.assert_close(a, b)


def test_train_and_eval_modes():
    plain, fast = build(ResidualBlock)
    x, _ = real_digits(16)
    for mode in (True, False, True):
        for m in (plain, fast):
            m.train(mode)
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)


# ---- observers -----------------------------------------------------------------------------------------------------


def test_hooks_see_every_layer(model, x):
    seen, back = [], []
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda m, i, o, name=name: seen.append((name, tuple(o.shape))))
        layer.register_full_backward_hook(lambda m, gi, go, name=name: back.append(name))
    model(x).sum().backward()
    assert seen == [
        ("conv1", (8, 10, 24, 24)), ("pool", (8, 10, 12, 12)), ("relu", (8, 10, 12, 12)),
        ("conv2", (8, 20, 8, 8)), ("pool", (8, 20, 4, 4)), ("relu", (8, 20, 4, 4)), ("fc", (8, 10)),
    ]  # fmt: skip
    assert back == [name for name, _ in reversed(seen)]


def test_trace_computes_and_does_not_remember(model, x):
    traced = torch.jit.trace(model, x)
    other = x.flip(0) * 0.5
    torch.testing.assert_close(traced(other), model(other))
    assert "fastnn::conv2d" in str(traced.inlined_graph)


def test_profiler_names(model, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastnn::conv2d", "fastnn::linear"} <= names


def test_export(model, x):
    exported = torch.export.export(model, (x,))
    assert "torch.ops.fastnn.conv2d" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x), model(x))


def test_meta_device_then_real_weights(model, x):
    with torch.device("meta"):
        empty = MnistCnn(fastnn)
    assert empty(x.to("meta")).shape == (8, 10)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))


def test_functional_call(model, x):
    doubled = {name: 2 * p for name, p in model.state_dict().items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(doubled)
    torch.testing.assert_close(torch.func.functional_call(model, doubled, (x,)), twin(x))


def small_cnn():
    nn = torch.nn
    layers = nn.Conv2d(1, 4, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 12, 10)
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_odd_batches(batch):
    plain, fast = build(small_cnn)
    x = torch.randn(batch, 1, 28, 28)
    ours, theirs = gradients(fast, x), gradients(plain, x)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True)


# ---- processes -----------------------------------------------------------------------------------------------------


class Pooled(Dataset):
    """Computes with fastnn inside the worker."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        image = torch.full((1, 8, 8), float(i))
        return fastnn.functional.max_pool2d(image, 2).sum()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(model, x, context):
    model(x).sum().backward()  # the parent's threads have run
    loader = DataLoader(Pooled(), 2, num_workers=1, multiprocessing_context=multiprocessing.get_context(context))
    assert torch.cat(list(loader)).tolist() == [16.0 * i for i in range(6)]


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_import_touches_no_gpu():
    result = python("import fastnn, torch; print(torch.cuda.is_initialized())", CUDA_VISIBLE_DEVICES="")
    assert result.stdout.strip() == "False", result.stderr


def test_import_again_in_one_process():
    result = python(
        "import sys, fastnn, torch\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'fastnn']: del sys.modules[name]\n"
        "import fastnn\n"
        "print(fastnn.Softmax(0)(torch.zeros(2)).tolist())\n"
    )
    assert result.stdout.strip() == "[0.5, 0.5]", result.stderr


def test_padding_by_a_copy_warns_once(monkeypatch):
    monkeypatch.setattr(sys.modules["fastnn.functional.conv2d"], "_warned_of_copy", False)
    x = torch.randn(1, 3, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastnn.functional.conv2d(x, torch.randn(2, 3, 3, 3), padding="same")
        assert not caught
        for _ in range(2):
            fastnn.Conv2d(3, 2, 2, padding="same")(x)
    assert [str(w.message)[:58] for w in caught] == ["Using padding='same' with even kernel lengths and odd dila"]
