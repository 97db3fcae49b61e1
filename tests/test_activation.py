"""What the activations promise beyond the case list: in-place relu and relu6, special values, strides, ulps."""

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


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize(("op", "low", "high", "ulps"), [("tanh", -10, 10, 2), ("sigmoid", -87, 20, 2.5)])
def test_error_in_ulp(op, low, high, ulps, isa):
    fastnn._C.set_isa(isa)
    x = torch.cat([torch.linspace(low, high, 400_001), torch.randn(100_000) * 0.3])
    exact = getattr(torch, op)(x.double())
    ulp = torch.ldexp(torch.ones(()), exact.abs().log2().floor().clamp(min=-126) - 23).double()
    y = getattr(fastnn.functional, op)(x).double()
    assert ((y - exact) / ulp)[x != 0].abs().max() <= ulps


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., :1].expand(-1, -1, 5),
        lambda x: x.transpose(0, 2)[1:],
        lambda x: x[0, 0, 0],
    ],
)
def test_strides_are_torchs(op, view):
    x = view(torch.randn(4, 6, 5))
    ours, torchs = getattr(fastnn.functional, op)(x), getattr(F, op)(x)
    assert ours.stride() == torchs.stride()
    torch.testing.assert_close(ours, torchs)
    assert not fastnn.fallbacks()


@pytest.mark.parametrize("op", ["relu", "gelu"])
def test_same_bits_for_every_thread_count(op):
    x = torch.randn(300_007)
    assert_same_bits_for_every_thread_count(lambda: [getattr(fastnn.functional, op)(x)])


# ---- in place ------------------------------------------------------------------------------------------------------


BOTH = pytest.mark.parametrize("op", ["relu", "relu6"])


@BOTH
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[:, 1::2], lambda x: x[1]])
def test_inplace_writes_the_input_and_bumps_its_version(view, op):
    base = 4 * torch.randn(6, 8)
    expected = base.clone()
    getattr(F, op)(view(expected), inplace=True)
    x = view(base)
    version = x._version
    assert getattr(fastnn.functional, op)(x, inplace=True) is not None
    assert torch.equal(base, expected)
    assert x._version == version + 1


@pytest.mark.parametrize("module", [fastnn.ReLU(inplace=True), fastnn.ReLU6(inplace=True)], ids=["ReLU", "ReLU6"])
def test_inplace_returns_the_same_tensor(module):
    x = torch.randn(3)
    assert module(x) is x


@BOTH
def test_inplace_in_a_graph(op):
    def gradient(library):
        x = torch.linspace(-1, 5, 12, dtype=torch.float64).requires_grad_()
        y = x * 2
        z = getattr(library, op)(y, inplace=True)
        assert z is y and y.grad_fn is not None and y._version == 1
        (g,) = torch.autograd.grad((y * z).sum(), x, create_graph=True)
        return g, torch.autograd.grad(g.sum(), x)[0]

    for a, b in zip(gradient(fastnn.functional), gradient(F), strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_inplace_on_a_view_rebases_the_base(op):
    def gradient(library):
        x = torch.linspace(-1, 7, 12).requires_grad_()
        base = x * 1
        getattr(library, op)(base.view(3, 4)[1], inplace=True)
        return torch.autograd.grad((base**2).sum(), x)[0]

    assert torch.equal(gradient(fastnn.functional), gradient(F))


@BOTH
def test_inplace_after_saving_is_an_error(op):
    x = torch.randn(4, requires_grad=True)
    y = x.exp()
    getattr(fastnn.functional, op)(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", [torch.ops.fastnn.relu_, torch.ops.fastnn.relu6_], ids=str)
def test_inplace_op_passes_opcheck(op):
    torch.library.opcheck(op, (torch.randn(3, 4),))


@BOTH
def test_inplace_compiles(op):
    def f(x):
        y = x * 2
        getattr(fastnn.functional, op)(y, inplace=True)
        return y + 1

    x = torch.linspace(-1, 2.9, 20, requires_grad=True)
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, getattr(F, op)(x * 2) + 1)
    out.sum().backward()
    assert torch.equal(x.grad, 2.0 * (x > 0))


def test_modules_call_the_kernels():
    x = torch.randn(3, 5)
    for name in ("ReLU", "ReLU6", "LeakyReLU", "Sigmoid", "Tanh", "GELU", "SiLU"):
        ours, torchs = getattr(fastnn, name)(), getattr(torch.nn, name)()
        assert repr(ours) == repr(torchs)
        torch.testing.assert_close(ours(x), torchs(x))
    assert not fastnn.fallbacks()
