"""What batch norm promises beyond the cases: large means, running statistics, modules, fused forms, mixed dtypes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits_for_every_thread_count
from torch.utils.checkpoint import checkpoint

import fastnn

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def images(*shape, layout="nchw", dtype=torch.float32, mean=0.0, std=1.0):
    return (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def fused_reference(x, residual, *args, **kwargs):
    y = F.batch_norm(x, *args, **kwargs)
    return F.relu(y if residual is None else y + residual)


# ---- accuracy ------------------------------------------------------------------------------------------------------


@by_layout
@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("mean", [0.0, 1e4, -3e5])
def test_a_large_mean_costs_no_accuracy(isa, layout, mean):
    fastnn._C.set_isa(isa)
    x = images(16, 5, 33, 35, layout=layout, mean=mean)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    running_mean, running_var = torch.zeros(5), torch.ones(5)
    y = fastnn.functional.batch_norm(x, running_mean, running_var, training=True, momentum=1.0)
    torch.testing.assert_close(running_mean, exact_mean.float(), rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(running_var, exact_var.float(), rtol=1e-6, atol=0)
    exact = F.batch_norm(x.double(), None, None, training=True)
    theirs = F.batch_norm(x, None, None, training=True)
    error, allowed = (y - exact).abs().max(), (theirs - exact).abs().max()
    assert error <= 2 * allowed + 2e-6


def test_blocks_with_different_means():
    x = torch.cat([torch.zeros(4, 2, 64, 64), 1e4 + torch.randn(4, 2, 64, 64)])
    for layout in LAYOUTS.values():
        y = fastnn.functional.batch_norm(x.contiguous(memory_format=layout), None, None, training=True)
        exact = F.batch_norm(x.double(), None, None, training=True)
        assert (y - exact).abs().max() < 1e-6


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("channels", [16, 96, 512])
def test_pixels_unlike_those_before_them(isa, channels):
    """channels_last sums are about the mean of a few pixels that come first."""
    fastnn._C.set_isa(isa)
    x = images(2, channels, 24, 24, layout="nhwc")
    x.permute(0, 2, 3, 1).reshape(-1, channels).view(18, 64, channels)[:, :8] += 100
    exact = F.batch_norm(x.double(), None, None, training=True)
    y, theirs = fastnn.functional.batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True)
    assert (y - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("channels", [1, 3, 16, 24, 40, 104, 250, 1000, 2500])
@pytest.mark.parametrize("pixels", [3, 40, 203])
def test_rows_taken_together_are_as_alone(isa, channels, pixels):
    """Evaluation takes several rows of channels at once, which must not be seen in a result or a gradient."""
    fastnn._C.set_isa(isa)
    mean, weight, bias = torch.randn(3, channels)
    var = torch.rand(channels) + 0.5

    def run(x, g):
        x = x.detach().requires_grad_()
        y = fastnn.functional.batch_norm(x, mean, var, weight, bias)
        y.backward(g)
        return torch.stack([y, x.grad]).detach()

    x, g = torch.randn(2, pixels, channels)
    assert torch.equal(run(x, g), torch.cat([run(a[None], b[None]) for a, b in zip(x, g, strict=True)], 1))


@pytest.mark.parametrize("channels", [96, 104, 1000])
def test_rows_past_the_caches(channels):
    """Results so large that they are streamed, the last rows not filling the cache lines of those before."""
    rows = 6 * 2**20 // channels + 5
    x, g = torch.randn(rows, channels), torch.randn(rows, channels)
    ours, theirs = [t.detach().requires_grad_() for t in (x, x)]
    running = torch.zeros(channels), torch.ones(channels)
    for training in (False, True):
        y = fastnn.functional.batch_norm(ours, *running, training=training, momentum=0.0)
        expected = F.batch_norm(theirs, *running, training=training, momentum=0.0)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            *(torch.autograd.grad(*p, g)[0] for p in ((y, ours), (expected, theirs))), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("channels", [130, 1000])
def test_sums_of_rows_past_the_caches(isa, channels):
    """Such rows are summed by strips, the last of which is not whole."""
    fastnn._C.set_isa(isa)
    x, g = torch.randn(2, 5 * 2**19 // channels + 70, channels)

    def gradients(batch_norm, dtype=torch.float32):
        leaves = x.to(dtype).requires_grad_(), *(torch.ones(2, channels, dtype=dtype) / 2).requires_grad_()
        return torch.autograd.grad(batch_norm(leaves[0], None, None, *leaves[1:], True), leaves, g.to(dtype))

    exact, theirs = gradients(F.batch_norm, torch.float64), gradients(F.batch_norm)
    for ours, right, other in zip(gradients(fastnn.functional.batch_norm), exact, theirs, strict=True):
        assert (ours - right).abs().max() <= 2 * (other - right).abs().max()
    assert_same_bits_for_every_thread_count(lambda: gradients(fastnn.functional.batch_norm)[1], (1, 2, 5))


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_few_streamed_rows_of_the_last_thread(isa):
    """Of 3226 rows the last of 32 threads takes two, the second of which begins within a vector of memory."""
    fastnn._C.set_isa(isa)
    x, g = torch.randn(2, 3226, 500)

    def gradient():
        leaf = x.detach().requires_grad_()
        y = fastnn.functional.batch_norm(leaf, torch.zeros(500), torch.ones(500), training=True)
        return torch.autograd.grad(y, leaf, g)

    assert_same_bits_for_every_thread_count(gradient, (1, 32))


# ---- running statistics --------------------------------------------------------------------------------------------


@by_layout
def test_statistics_are_written_in_place(layout):
    x = images(4, 3, 5, 5, layout=layout)
    mean, var = torch.zeros(3), torch.ones(3)
    fastnn.functional.batch_norm(x, mean, var, training=True)
    wide = torch.zeros(6), torch.ones(6)
    strided = wide[0][::2], wide[1][::2]
    fastnn.functional.batch_norm(x, *strided, training=True)
    assert torch.equal(strided[0], mean) and torch.equal(strided[1], var)
    assert wide[0][1::2].eq(0).all() and wide[1][1::2].eq(1).all()


def test_statistics_given_to_a_checkpoint():
    """torch counts no version of them up: what was saved with them is not refused afterwards."""

    def step(function):
        x, stats = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)), (torch.zeros(3), torch.ones(3))
        x.requires_grad_()
        y = checkpoint(lambda *tensors: function(*tensors, training=True), x, *stats, use_reentrant=False)
        y.square().sum().backward()
        return x.grad, *stats, [s._version for s in stats]

    torch.testing.assert_close(step(fastnn.functional.batch_norm), step(F.batch_norm))


def test_backward_leaves_the_statistics_alone():
    bn = fastnn.BatchNorm2d(3)
    y = bn(torch.randn(4, 3, 5, 5, requires_grad=True))
    before = copy.deepcopy(bn.state_dict())
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), bn.state_dict().values(), strict=True))


def test_statistics_changed_between_forward_and_backward():
    """An evaluation's gradient belongs to the statistics it was computed with."""
    x, mean, var = torch.randn(4, 3, 5, requires_grad=True), torch.zeros(3), torch.ones(3)
    y = fastnn.functional.batch_norm(x, mean, var)
    var.fill_(100.0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=1e-4, atol=0)


def test_statistics_of_inference_mode_are_refused_where_torch_saves_them():
    x = torch.randn(4, 3)
    with torch.inference_mode():
        statistics = torch.zeros(3), torch.ones(3)
    for training in (True, False):
        for f in (F.batch_norm, fastnn.functional.batch_norm):
            f(x, *statistics, training=training)
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                f(x.clone().requires_grad_(), *statistics, training=training)


# ---- modules -------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"bias": False},
    {"eps": 1e-3, "momentum": 0.3},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("name", "shape"), [("BatchNorm1d", (6, 4)), ("BatchNorm1d", (6, 4, 5)), ("BatchNorm2d", (3, 4, 5, 6))], ids=str
)
def test_module_is_torchs(name, shape, options):
    ours, torchs = getattr(fastnn, name)(4, **options), getattr(torch.nn, name)(4, **options)
    assert repr(ours) == repr(torchs)
    for step in range(4):
        if step == 3:
            ours.eval(), torchs.eval()
        a = torch.randn(shape, dtype=options.get("dtype"), requires_grad=True)
        b = a.detach().clone().requires_grad_()
        ya, yb = ours(a), torchs(b)
        torch.testing.assert_close(ya, yb)
        ya.square().sum().backward(), yb.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        assert ours.state_dict().keys() == torchs.state_dict().keys()
        for p, q in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    assert not fastnn.fallbacks()


def test_module_refuses_as_torch_does():
    for name, shape in (("BatchNorm1d", (2, 3, 4, 5)), ("BatchNorm2d", (2, 3)), ("BatchNormReLU2d", (2, 3, 4))):
        base = getattr(torch.nn, name.replace("ReLU", ""))
        with pytest.raises(ValueError) as theirs:
            base(3)(torch.randn(shape))
        with pytest.raises(ValueError) as ours:
            getattr(fastnn, name)(3)(torch.randn(shape))
        assert str(ours.value) == str(theirs.value)


# ---- ReLU and residual ---------------------------------------------------------------------------------------------


@by_layout
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (3, 20, 9, 9), (2, 70, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused(dtype, shape, with_residual, training, layout):
    def arguments(to):
        torch.manual_seed(1)
        t = [images(*shape, layout=layout, dtype=dtype), images(*shape, layout=layout, dtype=dtype)]
        t += [torch.randn(shape[1], dtype=dtype), torch.rand(shape[1], dtype=dtype) + 0.5]
        t += [torch.randn(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype)]
        t = [v.to(to) for v in t]
        for v in (t[0], t[1], t[4], t[5]):
            v.requires_grad_()
        return t

    def run(to, call):
        x, r, mean, var, w, b = arguments(to)
        y = call(x, r if with_residual else None, mean, var, w, b, training=training)
        torch.manual_seed(2)
        grads = torch.autograd.grad(y, [x, w, b] + [r] * with_residual, torch.randn_like(y.double()).to(dtype).to(to))
        return [y, *grads, mean, var]

    def ours(x, r, *args, **kwargs):
        if r is None:
            return fastnn.functional.batch_norm_relu(x, *args, **kwargs)
        return fastnn.functional.batch_norm_add_relu(x, r, *args, **kwargs)

    mine, theirs, exact = run(dtype, ours), run(dtype, fused_reference), run(torch.float64, fused_reference)
    for a, b, c in zip(mine, theirs, exact, strict=True):
        # The sign of an output within rounding of zero may differ: such a gradient is wrong in both, so compare means.
        scale = c.abs().max().item()
        bound = 2 * (b.double() - c).abs().mean().item() + 4 * torch.finfo(dtype).eps * scale
        assert a.dtype == b.dtype and (a.double() - c).abs().mean().item() <= bound
    assert mine[0].stride() == mine[1].stride() == theirs[0].stride()
    assert not fastnn.fallbacks()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_fused_derivatives(with_residual, training):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(2) + 0.5, torch.randn(2)]
    inputs = [t.double().requires_grad_() for t in inputs]
    mean, var = torch.randn(2).double(), torch.rand(2).double() + 0.5

    def function(x, r, w, b):
        stats = (mean.clone(), var.clone())
        if with_residual:
            return fastnn.functional.batch_norm_add_relu(x, r, *stats, w, b, training=training)
        return fastnn.functional.batch_norm_relu(x, *stats, w, b, training=training) + 0 * r

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@by_layout
@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_pass_exactly_where_the_output_is_positive(dtype, training, isa, layout):
    """Far from zero and in coarse steps, so that outputs fall on and around zero; the last channel is constant."""
    fastnn._C.set_isa(isa)
    x = (images(6, 7, 9, 11, layout=layout) * 3).round() / 4 + 1000
    x[:, -1] = 1000
    x, b = x.to(dtype).requires_grad_(), torch.zeros(7, dtype=dtype, requires_grad=True)
    mean, var = torch.full((7,), 1000.25, dtype=dtype), torch.ones(7, dtype=dtype)
    y = fastnn.functional.batch_norm_relu(x, mean, var, torch.linspace(-1, 2, 7, dtype=dtype), b, training=training)
    g = torch.randint(-3, 4, x.shape).to(dtype)  # their sums are exact
    (grad,) = torch.autograd.grad(y, b, g)
    assert torch.equal(grad, torch.where(y > 0, g, 0).sum((0, 2, 3)))


@by_layout
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 7, 9, 11), (2, 3, 17, 19), (5, 33, 3, 3), (2, 3, 1, 4100)])
def test_gradients_wanted_alone(shape, training, layout):
    """Each is the one computed with all others, and the residual's is what the ReLU let pass."""
    x, r, g = (images(*shape, layout=layout) for _ in range(3))
    mean, var, w, b = (torch.rand(shape[1]) + 0.5 for _ in range(4))
    for t in (x, r, w, b):
        t.requires_grad_()
    y = fastnn.functional.batch_norm_add_relu(x, r, mean, var, w, b, training=training)
    grads = torch.autograd.grad(y, [x, r, w, b], g, retain_graph=True)
    assert torch.equal(grads[1], torch.where(y > 0, g, 0))
    for t, grad in zip([x, r, w, b], grads, strict=True):
        u = [v if v is t else v.detach() for v in (x, r, w, b)]
        y = fastnn.functional.batch_norm_add_relu(u[0], u[1], mean, var, u[2], u[3], training=training)
        assert torch.equal(torch.autograd.grad(y, t, g)[0], grad)


def test_fused_modules():
    x, r = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    plain = torch.nn.BatchNorm2d(3)
    torch.testing.assert_close(fastnn.BatchNormReLU2d(3)(x), F.relu(plain(x)))
    torch.testing.assert_close(fastnn.BatchNormAddReLU2d(3)(x, r), F.relu(plain(x) + r))


def test_residual_that_broadcasts_runs_on_torch():
    x, r = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 1, 1)
    y = fastnn.functional.batch_norm_add_relu(x, r, None, None, training=True)
    torch.testing.assert_close(y, fused_reference(x, r, None, None, training=True))
    assert fastnn.fallbacks()


# ---- dtypes, layouts, threads --------------------------------------------------------------------------------------


@by_layout
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_beside_16_bit_input(dtype, training, layout):
    def run(library):
        torch.manual_seed(3)
        x = images(4, 20, 7, 7, layout=layout, dtype=dtype).requires_grad_()
        w, b = torch.randn(20, requires_grad=True), torch.randn(20, requires_grad=True)
        mean, var = torch.zeros(20), torch.ones(20)
        y = library.batch_norm(x, mean, var, w, b, training=training)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, w, b]), mean, var]

    for a, b in zip(run(fastnn.functional), run(F), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)
    assert not fastnn.fallbacks()


# Channels are taken in groups: the last group of a thread is smaller, of one channel in the second shape.
@by_layout
@pytest.mark.parametrize("shape", [(8, 24, 40, 41), (2, 130, 28, 28), (1, 1100, 14, 14), (4, 1300, 7, 7)])
def test_same_bits_for_every_thread_count(shape, layout):
    x, g = images(*shape, layout=layout).requires_grad_(), images(*shape, layout=layout)
    w, b = torch.randn(shape[1], requires_grad=True), torch.randn(shape[1], requires_grad=True)

    def step():
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        y = fastnn.functional.batch_norm_relu(x, mean, var, w, b, training=True)
        return [y, mean, var, *torch.autograd.grad(y, [x, w, b], g)]

    assert_same_bits_for_every_thread_count(step)


def test_only_needed_gradients():
    x, w = torch.randn(4, 3, 5, 5, requires_grad=True), torch.randn(3)
    mean, var = torch.zeros(3), torch.ones(3)
    assert fastnn.functional.batch_norm(x, mean, var, w).grad_fn is not None
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "fastnn::batch_norm_backward":
                seen.append(list(args[-1]))
            return func(*args, **(kwargs or {}))

    with Recorder():
        fastnn.functional.batch_norm(x, mean, var, w).sum().backward()
    assert seen == [[True, False, False, False]]


def test_compiles_with_its_statistics():
    ours, torchs = fastnn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = compiled(a), torchs(b)
        torch.testing.assert_close(y, z)
        y.square().sum().backward(), z.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for p, q in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("layout", "shape"), [("nchw", (2, 33, 256, 256)), ("nhwc", (2, 32, 260, 260))])
def test_images_past_the_caches(isa, training, layout, shape):
    """Outputs and gradients of 17 MB, written past the caches."""
    fastnn._C.set_isa(isa)
    x, g = (images(*shape, layout=layout) for _ in range(2))
    channels, w = shape[1], torch.randn(shape[1], requires_grad=True)
    x.requires_grad_()
    statistics = torch.zeros(channels), torch.ones(channels), torch.randn(channels)

    def run(batch_norm, dtype):
        mean, var, b = (s.to(dtype) for s in statistics)
        y = batch_norm(x.to(dtype), mean, var, w.to(dtype), b, training)
        return y, *torch.autograd.grad(y, [x, w], g.to(dtype))

    (y, *grads), (exact, *exact_grads) = (
        run(fastnn.functional.batch_norm, torch.float32),
        run(F.batch_norm, torch.double),
    )
    torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_infinite_channels_stay_alone(dtype, relu, isa):
    """Neighbouring channels of small planes share vectors."""
    fastnn._C.set_isa(isa)
    norm = fastnn.functional.batch_norm_relu if relu else fastnn.functional.batch_norm
    x, g = images(3, 37, 7, 7, dtype=dtype), images(3, 37, 7, 7, dtype=dtype)
    bad_x, bad_g = x.clone(), g.clone()
    bad_x[:, [0, 5, 36]], bad_g[:, [9, 20]] = math.inf, math.nan

    def gradients(x, g):
        x, w = x.clone().requires_grad_(), torch.ones(37, dtype=dtype, requires_grad=True)
        b = torch.zeros(37, dtype=dtype, requires_grad=True)
        y = norm(x, torch.zeros(37, dtype=dtype), torch.ones(37, dtype=dtype), w, b, training=True)
        return torch.autograd.grad(y, [x, w, b], g)

    good = [c for c in range(37) if c not in (0, 5, 9, 20, 36)]
    (dx, *rest), (bad_dx, *bad_rest) = gradients(x, g), gradients(bad_x, bad_g)
    assert torch.equal(dx[:, good], bad_dx[:, good])
    assert bad_dx[:, [9, 20]].isnan().any() and not bad_dx[:, good].isnan().any()
    for a, b in zip(rest, bad_rest, strict=True):
        assert torch.equal(a[good], b[good])
