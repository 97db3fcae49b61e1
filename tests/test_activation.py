"""What the activations promise beyond the case list: in-place forms, special values, strides, ulps."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits_for_every_thread_count

import fastnn

UNARY = ["relu", "relu6", "leaky_relu", "sigmoid", "tanh", "gelu", "silu"]
SPECIAL = torch.tensor(
    [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 6.0, 7.0, 88.0, -88.0, -100.0]
)


def test_relu_derivative_at_zero_is_zero():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    assert torch.autograd.grad(fastnn.functional.relu(x).sum(), x)[0].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_relu6_on_both_sides_of_its_ends(dtype):
    values = torch.tensor([-1.0, 0.0, 0.5, 5.9, 6.0, 6.1, 100.0], dtype=dtype).repeat(9)

    def gradients(function):
        x = values.clone().requires_grad_()
        y = function(x)
        (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        return y, g, torch.autograd.grad(g.sum(), x)[0]

    for inplace in (False, True):
        ours = gradients(lambda x: fastnn.functional.relu6(x * 1, inplace))  # noqa: B023
        for a, b in zip(ours, gradients(F.relu6), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("op", UNARY)
def test_special_values(op, isa):
    fastnn._C.set_isa(isa)
    for x in (SPECIAL, SPECIAL.repeat(4)):  # in the tail, and in whole vectors
        mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        # torch in float64: its own float32 gelu(inf) is NaN.
        y, z = getattr(fastnn.functional, op)(mine), getattr(F, op)(exact)
        y.sum().backward(), z.sum().backward()
        torch.testing.assert_close(y, z.float(), equal_nan=True)
        torch.testing.assert_close(mine.grad, exact.grad.float(), equal_nan=True)
        assert torch.equal(y[x == 0].signbit(), z[x == 0].signbit())


def ulps(y, exact):
    """Errors in units in the last place of the exact values."""
    info = torch.finfo(y.dtype)
    return (y.double() - exact).abs() / (torch.exp2(exact.abs().clamp(min=info.tiny).log2().floor()) * info.eps)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize(("op", "low", "high", "bound"), [("tanh", -10, 10, 2), ("sigmoid", -87, 20, 2.5)])
def test_error_in_ulp(op, low, high, bound, isa):
    fastnn._C.set_isa(isa)
    x = torch.cat([torch.linspace(low, high, 400_001), torch.randn(100_000) * 0.3])
    x = x[x != 0]
    assert ulps(getattr(fastnn.functional, op)(x), getattr(torch, op)(x.double())).max() <= bound


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_float64_tanh_in_ulp(isa):
    fastnn._C.set_isa(isa)
    x = torch.cat([torch.linspace(-20, 20, 100_001), torch.randn(99_999) * 0.3]).double()
    x = x[x != 0]
    assert ulps(fastnn.functional.tanh(x), x.tanh()).max() <= 3.5  # torch's is within one of the truth


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", UNARY)
def test_elements_do_not_depend_on_their_place(op, dtype, isa):
    """Vectors are computed up to four side by side, the last of them in part."""
    fastnn._C.set_isa(isa)
    function = getattr(fastnn.functional, op)
    values, gradients = (4 * torch.randn(2, 80)).to(dtype)

    def both(begin, end):
        x = values[begin:end].clone().requires_grad_()
        y = function(x)
        return torch.stack([y.detach(), *torch.autograd.grad(y, x, gradients[begin:end])])

    whole = both(0, 80)
    for end in range(1, 80):
        assert torch.equal(both(0, end), whole[:, :end])
        assert torch.equal(both(80 - end, 80), whole[:, 80 - end :])
        if op in ("relu", "relu6", "leaky_relu", "silu"):  # in place, lines with gaps between them
            lines = values.repeat(3, 1)
            function(lines[:, :end], inplace=True)
            assert torch.equal(lines, torch.cat([whole[0, :end], values[end:]]).expand(3, 80))


def exact_gelu(x):
    """gelu and its derivative in float64."""
    x = x.double()
    cdf = torch.special.erfc(x * -math.sqrt(0.5)) / 2
    return x * cdf, cdf + x * torch.exp(x * x / -2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_gelu_in_ulp(isa):
    """A few ulp where gelu is large, a small relative error far into the tail; torch is off by 1e-6."""
    fastnn._C.set_isa(isa)
    x = torch.cat([torch.linspace(-13, 13, 400_001), torch.randn(100_000), torch.logspace(-30, 0, 1000)])
    x.requires_grad_()
    y = fastnn.functional.gelu(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    value, slope = exact_gelu(x.detach())
    error = ulps(y.detach(), value)
    error[x == 0] = 0
    assert error[x > -1].max() <= 4
    assert error[x > -6].max() <= 300
    assert (y - value)[x < 0].abs().max() <= 5e-8  # 4e-7 is an ulp of gelu(4) and more
    assert (g - slope).abs().max() <= 1.6e-7


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_float64_gelu(isa):
    fastnn._C.set_isa(isa)
    x = torch.linspace(-40, 40, 100_001, dtype=torch.float64).requires_grad_()
    y = fastnn.functional.gelu(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    value, slope = exact_gelu(x.detach())
    torch.testing.assert_close(y, value, rtol=1e-15, atol=2e-16)
    torch.testing.assert_close(g, slope, rtol=0, atol=1e-15)
    assert ulps(y.detach(), value)[(x > -1) & (x != 0)].max() <= 5
    near = (x < 0) & (x > -8)
    torch.testing.assert_close(y[near], value[near], rtol=1e-10, atol=0)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_gelu(dtype, isa):
    fastnn._C.set_isa(isa)
    x = torch.linspace(-12, 12, 100_001, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, value = fastnn.functional.gelu(x, approximate="tanh"), F.gelu(exact, approximate="tanh")
    (g,), (slope,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(value.sum(), exact)
    eps = torch.finfo(dtype).eps
    floor = (1 if dtype == torch.float32 else 64) * eps  # the float64 reference loses the tail to 1 + tanh
    assert ((y - value).abs() <= 4 * eps * value.abs() + floor).all()
    assert (g - slope).abs().max() <= 4 * floor


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("slope", [257 / 256, 0.3, 3 * 2.0**-9])
def test_bfloat16_rounds_to_even(slope, isa):
    """Products of every bfloat16: ties, subnormals, infinities and NaNs with any payload."""
    fastnn._C.set_isa(isa)
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    expected = torch.where(x > 0, x, (x.float() * slope).bfloat16())
    y = fastnn.functional.leaky_relu(x, slope)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~x.isnan()].view(torch.int16), expected[~x.isnan()].view(torch.int16))


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("op", ["relu", "silu"])
def test_more_than_the_caches_keep(op, isa):
    """Results that may be written past them, whole and in lines that begin anywhere."""
    fastnn._C.set_isa(isa)
    whole = torch.randn(2621, 4001)
    for x, grad in ((whole, torch.randn_like(whole)), (whole[:, 1:], torch.randn(2621, 4000))):
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        results = [getattr(f, op)(leaf) for f, leaf in zip((fastnn.functional, F), leaves, strict=True)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(y, leaf, grad)[0] for y, leaf in zip(results, leaves, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(getattr(fastnn.functional, op)(x), results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., :1].expand(-1, -1, 5),
        lambda x: x.transpose(0, 2)[1:],
        lambda x: x[0, 0, 0],
        lambda x: x.repeat(300, 30, 20)[..., 1:-1],  # a large one
    ],
)
def test_strides_are_torchs(op, view):
    x = view(torch.randn(4, 6, 5))
    ours, torchs = getattr(fastnn.functional, op)(x), getattr(F, op)(x)
    assert ours.stride() == torchs.stride()
    torch.testing.assert_close(ours, torchs)
    assert not fastnn.fallbacks()


# Order of the dimensions in memory, and what is left out: so many elements of one of them, or every other one.
VIEWS = {
    "no gaps": ((0, 1, 2), 0, 0, 1),
    "channels": ((0, 1, 2), 1, 5, 1),
    "last": ((0, 1, 2), 2, 3, 1),
    "permuted": ((2, 0, 1), 0, 0, 1),
    "permuted, first": ((2, 0, 1), 0, 4, 1),
    "permuted, middle": ((0, 2, 1), 1, 2, 1),
    "permuted, last": ((0, 2, 1), 2, 1, 1),
    "every other": ((0, 1, 2), 2, 0, 2),
    "every other row": ((0, 1, 2), 1, 0, 2),
    "every ninth": ((0, 1, 2), 2, 0, 9),
}


def seen_as(values, view):
    """The values in memory as `view` says, and that memory, which holds NaN besides."""
    order, dim, more, step = VIEWS[view]
    sizes = [values.shape[d] for d in order]
    used, sizes[dim] = sizes[dim] * step, sizes[dim] * step + more
    base = torch.full(sizes, math.nan)
    window = base.narrow(dim, more // 2, used)
    window = window.unflatten(dim, (-1, step)).select(dim + 1, 0).permute([order.index(d) for d in range(3)])
    return window.copy_(values), base


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("of_grad", VIEWS)
@pytest.mark.parametrize("of_input", VIEWS)
def test_views(of_input, of_grad, isa):
    """What the kernels read and write where it lies, and what is far apart and copied."""
    fastnn._C.set_isa(isa)
    values, gradients = torch.randn(2, 3, 7, 19 * 27)
    for op in UNARY:
        function = getattr(fastnn.functional, op)
        plain = values.clone().requires_grad_()
        y = function(plain)
        (expected,) = torch.autograd.grad(y, plain, gradients)
        x = seen_as(values, of_input)[0].requires_grad_()
        z = function(x)
        (g,) = torch.autograd.grad(z, x, seen_as(gradients, of_grad)[0])
        assert torch.equal(z, y)
        assert torch.equal(g, expected)
        if op in ("relu", "relu6", "leaky_relu", "silu"):
            x, base = seen_as(values, of_input)
            function(x, inplace=True)
            assert torch.equal(x, y)
            assert base.isnan().sum() == base.numel() - x.numel()


@pytest.mark.parametrize("size", [4096, 4097, 40_000])
def test_gradient_of_a_sum(size):
    """One value seen as many."""
    x = torch.randn(2, size // 2 + 1, requires_grad=True)
    for op in UNARY:
        y = getattr(fastnn.functional, op)(x)
        (g,) = torch.autograd.grad(y, x, torch.tensor(0.3).expand_as(y), retain_graph=True)
        assert torch.equal(g, torch.autograd.grad(y, x, torch.full_like(y, 0.3))[0])


# Lines of 1 to 40 elements, planes of lines with gaps between all of them, what more than three dimensions make, and
# values repeated along each of them.
PARTS = {
    "crop": lambda t: t[1:, :, 1:-1, 2:-3],
    "crop of columns": lambda t: t[..., 3:-2],
    "every other of a crop": lambda t: t[:, 1:, 1:-1, 1:-1:2],
    "everything in part": lambda t: t.unflatten(3, (5, -1))[:-1, 1:, 1:, :-1, 1:],
    "transposed": lambda t: t.transpose(1, 3)[:, :, 1:],
    "image of one value": lambda t: t[:, :, :1, :1].expand_as(t),
    "line of one value": lambda t: t[..., :1].expand_as(t),
    "batch of one image": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("columns", [10, 15, 25, 45])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_of_images(part, columns, isa):
    fastnn._C.set_isa(isa)
    for op in ("leaky_relu", "gelu"):
        function = getattr(fastnn.functional, op)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x, g = (part(torch.randn(3, 4, 9, columns).to(dtype)) for _ in range(2))
            dense = x.contiguous().requires_grad_()
            y = function(dense)
            (expected,) = torch.autograd.grad(y, dense, g.contiguous())
            for seen, seen_g in ((x, g), (x, g.contiguous()), (x.contiguous(), g)):
                leaf = seen.detach().requires_grad_()
                z = function(leaf)
                assert torch.equal(z, y)
                assert torch.equal(torch.autograd.grad(z, leaf, seen_g)[0], expected)
            if op == "leaky_relu" and 0 not in x.stride():
                base = torch.full((3, 4, 9, columns), math.nan, dtype=dtype)
                function(part(base).copy_(x), inplace=True)
                assert torch.equal(part(base), y.detach())
                assert base.isnan().sum() == base.numel() - y.numel()
    assert not fastnn.fallbacks()


def test_an_expanded_batch():
    x = torch.randn(1, 5, 20).expand(4, -1, -1)
    assert torch.equal(fastnn.functional.gelu(x), fastnn.functional.gelu(x.contiguous()))
    with pytest.raises(RuntimeError, match="single memory location"):
        fastnn.functional.relu(x, inplace=True)


@pytest.mark.parametrize("op", ["relu", "gelu"])
def test_same_bits_for_every_thread_count(op):
    x = torch.randn(300_007)
    assert_same_bits_for_every_thread_count(lambda: [getattr(fastnn.functional, op)(x)])


# ---- in place ------------------------------------------------------------------------------------------------------


INPLACE = pytest.mark.parametrize("op", ["relu", "relu6", "leaky_relu", "silu"])


@INPLACE
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[:, 1::2], lambda x: x[1]])
def test_inplace_writes_the_input_and_bumps_its_version(view, op):
    base = 4 * torch.randn(6, 8)
    expected = base.clone()
    getattr(F, op)(view(expected), inplace=True)
    x = view(base)
    version = x._version
    assert getattr(fastnn.functional, op)(x, inplace=True) is not None
    torch.testing.assert_close(base, expected)
    assert x._version == version + 1


@pytest.mark.parametrize("name", ["ReLU", "ReLU6", "LeakyReLU", "SiLU"])
def test_inplace_returns_the_same_tensor(name):
    x = torch.randn(3)
    assert getattr(fastnn, name)(inplace=True)(x) is x
    assert not fastnn.fallbacks()


@pytest.mark.parametrize(("op", "args"), [("silu", ()), ("leaky_relu", (-0.1,))])
def test_inplace_handed_to_torch_where_a_gradient_is_needed(op, args):
    x = torch.randn(6, requires_grad=True)
    y = getattr(fastnn.functional, op)(x * 1, *args, inplace=True)
    assert fastnn.fallbacks() == {(f"{op}_", "in place with a gradient"): 1}
    torch.testing.assert_close(y, getattr(F, op)(x, *args))


@INPLACE
def test_inplace_in_a_graph(op):
    def gradient(library):
        x = torch.linspace(-1, 5, 12, dtype=torch.float64).requires_grad_()
        y = x * 2
        z = getattr(library, op)(y, inplace=True)
        assert z is y and y.grad_fn is not None and y._version == 1
        assert library is F or y.grad_fn.name() in (op, "SiluBackward0")  # errors and profilers name the node
        (g,) = torch.autograd.grad((y * z).sum(), x, create_graph=True)
        return g, torch.autograd.grad(g.sum(), x)[0]

    for a, b in zip(gradient(fastnn.functional), gradient(F), strict=True):
        torch.testing.assert_close(a, b)


@INPLACE
def test_inplace_on_a_view_rebases_the_base(op):
    def gradient(library):
        x = torch.linspace(-1, 7, 12).requires_grad_()
        base = x * 1
        getattr(library, op)(base.view(3, 4)[1], inplace=True)
        return torch.autograd.grad((base**2).sum(), x)[0]

    assert torch.equal(gradient(fastnn.functional), gradient(F))


@INPLACE
def test_inplace_after_saving_is_an_error(op):
    x = torch.randn(4, requires_grad=True)
    y = x.exp()
    getattr(fastnn.functional, op)(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", ["relu6", "leaky_relu", "gelu", "silu"])
def test_output_may_be_changed(op):
    """As in x * relu6(x + 3).div_(6): these keep their input for backward."""

    def gradient(f):
        x = torch.linspace(-4, 9, 40).requires_grad_()
        return torch.autograd.grad((x * getattr(f, op)(x).div_(6)).sum(), x)[0]

    torch.testing.assert_close(gradient(fastnn.functional), gradient(F))


def test_output_of_relu6_in_place_may_be_changed():
    def gradient(f):
        x = torch.linspace(-4, 9, 40).requires_grad_()
        y = f.relu6(x * 1, inplace=True)
        y += x
        return torch.autograd.grad((y * f.relu(y.div_(6), inplace=True)).sum(), x)[0]

    torch.testing.assert_close(gradient(fastnn.functional), gradient(F))


@pytest.mark.parametrize(("op", "args"), [("relu_", ()), ("relu6_", ()), ("leaky_relu_", (0.1,)), ("silu_", ())])
def test_inplace_op_passes_opcheck(op, args):
    torch.library.opcheck(getattr(torch.ops.fastnn, op), (torch.randn(3, 4), *args))


@INPLACE
def test_inplace_compiles(op):
    torch._dynamo.reset()

    def f(x):
        y = x * 2
        getattr(fastnn.functional, op)(y, inplace=True)
        return y + 1

    x = torch.linspace(-1, 2.9, 20, requires_grad=True)
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, getattr(F, op)(x * 2) + 1)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(getattr(F, op)(x * 2).sum(), x)[0])


@pytest.mark.parametrize("op", ["relu", "relu6", "leaky_relu"])  # silu raises, torch's and with it ours
@pytest.mark.parametrize(
    "use", [lambda x, y: x * y, lambda x, y: x.sin(), lambda x, y: y], ids=["both", "input", "result"]
)
def test_inplace_on_an_input_of_a_compiled_function(op, use):
    """The gradient passes the change, although the graph only copies the new values into its input."""

    torch._dynamo.reset()

    def gradient(library, compiled):
        def f(x):
            return use(x, getattr(library, op)(x, inplace=True))

        x = torch.linspace(-3, 9, 24, requires_grad=True)
        out = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(x * 1)
        return torch.autograd.grad(out.sum(), x)[0]

    torch.testing.assert_close(gradient(fastnn.functional, True), gradient(F, False))


def test_modules_call_the_kernels():
    x = torch.randn(3, 5)
    for name in ("ReLU", "ReLU6", "LeakyReLU", "Sigmoid", "Tanh", "GELU", "SiLU"):
        ours, torchs = getattr(fastnn, name)(), getattr(torch.nn, name)()
        assert repr(ours) == repr(torchs)
        torch.testing.assert_close(ours(x), torchs(x))
    assert not fastnn.fallbacks()


@pytest.mark.parametrize("name", ["ReLU", "ReLU6", "LeakyReLU", "Sigmoid", "Tanh", "GELU", "SiLU"])
def test_layers_refuse_what_is_no_tensor_as_torchs(name):
    for value in (None, [1.0], "text"):
        with pytest.raises(Exception) as theirs:
            getattr(torch.nn, name)()(value)
        with pytest.raises(theirs.type) as ours:
            getattr(fastnn, name)()(value)
        if name != "ReLU6":  # whose error names the function hardtanh
            assert str(ours.value) == str(theirs.value)
