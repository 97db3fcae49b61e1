"""What only a CUDA device can show: graph capture, streams, no synchronisation, tensors past 32-bit indices.

Without a device the same tests run on the CPU, where they show that they work.
"""

import copy
import functools

import pytest
import torch
from cases import ALL, differentiable
from device_tools import DEVICE, ON_CUDA, capture, new_stream, no_synchronisation, synchronise

import fastnn

sanitize = pytest.mark.sanitize  # benches/cuda_report.py runs these under compute-sanitizer
NATIVE = [c for c in ALL if "aten" not in c.tags]
ONE_OF_EACH = list({c.op: c for c in reversed(NATIVE)}.values())


def small_net(nn):
    layers = nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), torch.nn.Flatten(), nn.Linear(1440, 10)
    return torch.nn.Sequential(*layers).to(DEVICE)


def digits(n):
    return torch.randn(n, 1, 28, 28, device=DEVICE), torch.randint(0, 10, (n,), device=DEVICE)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[sanitize] * (c in ONE_OF_EACH)) for c in (NATIVE if ON_CUDA else ONE_OF_EACH)],
)
def test_no_synchronisation(case):
    args, kwargs = case.build(torch.float32, DEVICE)
    with no_synchronisation():
        out = case.fast(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    if inputs := differentiable(args, kwargs):
        seed = torch.randn_like(out)
        with no_synchronisation():
            torch.autograd.grad(out, inputs, seed, allow_unused=True)


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


def test_graph_capture_of_a_training_step():
    """Forward, backward and the optimizer's step, replayed for new batches, end where ordinary steps end."""
    torch.manual_seed(0)
    model = small_net(fastnn)
    twin = copy.deepcopy(model)
    first = copy.deepcopy(model.state_dict())
    x, y = digits(8)

    def stepper(net, inputs, targets):
        optimizer = fastnn.optim.SGD(net.parameters(), lr=1e-2)

        def step():
            optimizer.zero_grad()
            loss = fastnn.functional.cross_entropy(net(inputs), targets)
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        return step

    (loss,), replay = capture(stepper(model, x, y))
    model.load_state_dict(first)  # the steps before have changed it
    own_x, own_y = x.clone(), y.clone()
    ordinary = stepper(twin, own_x, own_y)
    for _ in range(3):
        batch, labels = digits(8)
        x.copy_(batch), own_x.copy_(batch)
        y.copy_(labels), own_y.copy_(labels)
        replay()
        (expected,) = ordinary()
        torch.testing.assert_close(loss, expected)
    for p, q, before in zip(model.parameters(), twin.parameters(), first.values(), strict=True):
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, before)


def test_graph_capture_of_a_model_in_evaluation():
    torch.manual_seed(0)
    model = fastnn.fuse(small_net(fastnn).eval())
    x, _ = digits(8)
    with torch.no_grad():
        (captured,), replay = capture(lambda: [model(x)])
        before = captured.clone()
        x.copy_(torch.randn_like(x))
        replay()
        torch.testing.assert_close(captured, model(x))
        assert not torch.equal(captured, before)


# ---- streams -------------------------------------------------------------------------------------------------------


def test_training_on_two_streams_at_once():
    """Two models trained on streams of their own, interleaved, end as they do one after the other."""

    def train(streams):
        models, inputs = [], []
        for seed in range(2):
            torch.manual_seed(seed)
            models.append(small_net(fastnn))
            inputs.append(digits(16))
        optimizers = [fastnn.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in models]
        synchronise()
        for _ in range(5):
            for i, stream in enumerate(streams):
                with stream:
                    optimizers[i].zero_grad()
                    fastnn.functional.cross_entropy(models[i](inputs[i][0]), inputs[i][1]).backward()
                    optimizers[i].step()
        synchronise()
        return [p.detach().clone() for m in models for p in m.parameters()]

    one = new_stream()
    alone = train([one, one])
    both = train([new_stream(), new_stream()])
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["softmax", "relu", "max_pool2d", "conv2d", "linear", "cross_entropy", "batch_norm"])
def test_side_stream(name):
    """Kernels go to the current stream: there the input is written late, and elsewhere it would be read too early."""
    x = torch.randn(64, 64, 32, 32, device=DEVICE)
    weight = {"conv2d": (64, 1, 3, 3), "linear": (64, 32)}.get(name)
    w = torch.randn(weight, device=DEVICE) if weight else None

    def call(library, x):
        function = getattr(library, name)
        if name == "conv2d":
            return function(x, w, padding=1, groups=64)
        if name == "cross_entropy":
            return function(x, torch.zeros(64, 32, 32, dtype=torch.int64, device=DEVICE))
        if name == "batch_norm":
            return function(x, None, None, training=True)
        return function(x, *{"softmax": [-1], "max_pool2d": [2], "linear": [w]}.get(name, []))

    expected = call(torch.nn.functional, x * 2)
    side = new_stream()
    synchronise()
    with side:
        if ON_CUDA:
            torch.cuda._sleep(50_000_000)
        ours = call(fastnn.functional, x * 2)
    synchronise()
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


# ---- more than 2^31 elements ---------------------------------------------------------------------------------------

LARGE = {
    "relu": lambda f, x: f.relu(x),
    "softmax": lambda f, x: f.softmax(x, -1),
    "softmax of columns": lambda f, x: f.softmax(x, 1),
    "max_pool2d": lambda f, x: f.max_pool2d(x, 2),
    "avg_pool2d": lambda f, x: f.avg_pool2d(x, 3, 2, 1),
    "batch_norm": lambda f, x: f.batch_norm(x, torch.zeros_like(x[0, :, 0, 0]), torch.ones_like(x[0, :, 0, 0])),
    "conv2d": lambda f, x: f.conv2d(x, torch.ones(16, 1, 3, 3, dtype=x.dtype, device=x.device), None, 1, 1, 1, 16),
}


@functools.cache
def images():
    """So many images of 16x128x128 that they have more than 2^31 elements, where the device has the memory."""
    enough = ON_CUDA and torch.cuda.mem_get_info()[0] > 60 << 30
    return (1 << 31) // (16 * 128 * 128) + 3 if enough else 3


@pytest.mark.large
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_more_elements_than_32_bits_count(name, channels_last):
    op, n = LARGE[name], images()
    dtype = torch.float32 if name == "conv2d" else torch.bfloat16  # the dtype that fastnn's kernel is chosen for
    x = torch.empty(n, 16, 128, 128, dtype=dtype, device=DEVICE)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.normal_().requires_grad_()
    y = op(fastnn.functional, x)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    for part in (slice(0, 1), slice(n // 2, n // 2 + 1), slice(n - 1, n)):  # on either side of every cut
        few = x.detach()[part].requires_grad_()
        expected = op(torch.nn.functional, few)
        (grad,) = torch.autograd.grad(expected, few, expected.detach())
        torch.testing.assert_close(y[part], expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(dx[part], grad, rtol=2e-2, atol=6e-2)


# ---- models and optimizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [torch.nn.Identity, torch.nn.ReLU, torch.nn.ReLU6, torch.nn.SiLU])
def test_fused_layers(activation, channels_last):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = fastnn.Conv2d(8, 8, 3, padding=1), fastnn.BatchNorm2d(8)
            self.depthwise, self.linear = fastnn.Conv2d(8, 8, 3, groups=8), fastnn.Linear(8, 70)
            self.act = activation()

        def forward(self, x):
            x = self.act(self.norm(self.conv(x)) + x)
            return self.act(self.linear(self.act(self.depthwise(x)).mean((2, 3))))

    torch.manual_seed(0)
    model, x = Net().to(DEVICE).eval(), torch.randn(4, 8, 9, 9, device=DEVICE)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fastnn.fuse(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_autotune(tmp_path):
    model, (x, _) = small_net(fastnn), digits(8)
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    with fastnn.autotune(tmp_path) as tuner:
        for _ in range(2):
            actual = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    assert {key.split(" ")[0] for key in tuner.choices} >= ({"conv2d", "linear"} if ON_CUDA else set())
    assert all(ours > 0 and theirs > 0 for _, ours, theirs in tuner.choices.values())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # tf32 may be allowed for one of them
    with fastnn.autotune(tmp_path, measure=False) as again:
        model(x)
    assert again.choices.items() <= tuner.choices.items()


@sanitize
def test_clip_grad_norm_without_synchronisation():
    grads = [torch.randn(s, device=DEVICE) for s in ((3,), (400, 400), (0, 4))]
    ours, torchs = ([torch.nn.Parameter(torch.zeros_like(g)) for g in grads] for _ in "ab")
    for g, p, q in zip(grads, ours, torchs, strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    with no_synchronisation():
        norm = fastnn.clip_grad_norm_(ours, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(torchs, 1.0))
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


EXTRA = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "Adadelta"])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=sanitize), torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_optimizer(name, dtype):
    """Five steps are at most twice as far from float64 as torch's own, above a floor of a few rounding steps."""
    options = {"lr": 1e-2, "weight_decay": 0.1, **EXTRA.get(name, {})}
    shapes = [(3,), (17, 5), (4, 3, 3, 3), (), (0, 4), (10000,)]

    def parameters(dtype):
        return [torch.nn.Parameter(torch.ones(s, device=DEVICE, dtype=dtype)) for s in shapes]

    ours, torchs, exact = parameters(dtype), parameters(dtype), parameters(torch.float64)
    torch_optimizer = getattr(torch.optim, name)
    optimizers = [getattr(fastnn.optim, name)(ours, **options)]
    optimizers += [torch_optimizer(torchs, **options), torch_optimizer(exact, **options)]
    for _ in range(5):
        for p, q, r in zip(ours, torchs, exact, strict=True):
            g = torch.randn_like(p)
            p.grad = g + g.sign() / 2  # the square of less would vanish in float16
            q.grad, r.grad = p.grad.clone(), p.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    assert fastnn.fallbacks() == {}
    for p, q, r in zip(ours, torchs, exact, strict=True):
        if p.numel():
            floor = 16 * torch.finfo(dtype).eps * r.abs().max()
            assert (p - r).abs().max() <= 2 * (q - r).abs().max() + floor
