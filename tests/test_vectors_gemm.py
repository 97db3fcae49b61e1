"""Published figures for matrix products, and their corner cases."""

import pytest
import torch
from compare import assert_same_bits_for_every_thread_count

import fastnn
from fastnn import functional as F


def test_three_layer_net_by_hand():
    x = torch.tensor([[1.0, 0.5]])
    w1, b1 = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]]), torch.tensor([0.1, 0.2, 0.3])
    w2, b2 = torch.tensor([[0.1, 0.4], [0.2, 0.5], [0.3, 0.6]]), torch.tensor([0.1, 0.2])
    w3, b3 = torch.tensor([[0.1, 0.3], [0.2, 0.4]]), torch.tensor([0.1, 0.2])
    h = F.addmm(b1, x, w1).sigmoid()
    h = (F.matmul(h, w2) + b2).sigmoid()
    y = F.linear(h, w3.t(), b3)
    torch.testing.assert_close(y, torch.tensor([[0.31682708, 0.69627909]]))


def test_products():
    a, b = torch.tensor([[2.0, 3], [4, 5]]), torch.tensor([[6.0, 7], [8, 9]])
    assert F.mm(a, b).tolist() == [[36, 41], [64, 73]]
    c = torch.arange(16.0)
    assert F.bmm(c.view(2, 2, 4), c.view(2, 4, 2)).tolist() == [[[28, 34], [76, 98]], [[428, 466], [604, 658]]]
    m, v = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([1.0, 2])
    assert F.matmul(m, v).tolist() == [5, 11] and F.matmul(v, m).tolist() == [7, 10]


def test_linear_regression():
    layer = fastnn.Linear(1, 1)
    layer.weight.data.fill_(0.27363137)
    layer.bias.data.fill_(0.29616197)
    x, y = torch.tensor([[1.0], [2], [3]]), torch.tensor([[2.0], [4], [6]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        loss = (layer(x) - y).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(35.8526, abs=1e-4) and losses[99] == pytest.approx(0.0803, abs=1e-4)
    assert layer.weight.item() == pytest.approx(1.8113371, abs=1e-5)
    assert layer.bias.item() == pytest.approx(0.4288749, abs=1e-5)


@pytest.mark.parametrize("beta", [0, 0.0])
def test_beta_zero_ignores_nan(beta):
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    out = F.addmm(torch.full((5,), float("nan")), a, b, beta=beta)
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize("alpha", [0, 0.0])
def test_alpha_zero_ignores_nan(alpha):
    a, b, c = torch.full((3, 4), float("nan")), torch.randn(4, 5), torch.randn(5)
    assert torch.equal(F.addmm(c, a, b, alpha=alpha), torch.addmm(c, a, b, alpha=alpha))


def test_nan_and_inf_reach_every_output_they_touch():
    for m in (1, 5, 100):
        a, b = torch.randn(m, 40), torch.randn(33, 40)
        a[0, 7], b[3, 9] = float("nan"), float("inf")
        ours, torchs = F.linear(a, b), torch.nn.functional.linear(a, b)
        assert torch.equal(ours.isnan(), torchs.isnan()) and torch.equal(ours.isinf(), torchs.isinf())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_run_on_torch(dtype):
    a, b = torch.ones(3, 4, dtype=dtype), torch.ones(4, 5, dtype=dtype)
    if dtype == torch.bool:
        with pytest.raises(RuntimeError):
            torch.mm(a, b)
        with pytest.raises(RuntimeError):
            F.mm(a, b)
    else:
        assert torch.equal(F.mm(a, b), torch.mm(a, b)) and torch.equal(F.matmul(a, b), torch.matmul(a, b))
    assert ("mm", "dtype") in {tuple(k) for k in fastnn.fallbacks()}


def test_integer_factors_stay_integers():
    a, b, c = (torch.ones(s, dtype=torch.int64) for s in ((3, 0), (0, 5), (5,)))
    assert torch.equal(F.addmm(c, a, b, beta=2), torch.addmm(c, a, b, beta=2))


def test_out_runs_on_torch_and_is_counted():
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    assert F.mm(a, b, out=out) is out and torch.equal(out, torch.mm(a, b))
    assert F.addmm(b[0], a, b, out=out) is out and torch.equal(out, torch.addmm(b[0], a, b))
    assert F.matmul(a, b, out=out) is out
    batch = torch.empty(1, 3, 5)
    assert F.bmm(a[None], b[None], out=batch) is batch
    assert {op for op, _ in fastnn.fallbacks()} == {"mm", "addmm", "matmul", "bmm"}


SHAPES = [(1, 300, 700), (8, 256, 300), (64, 512, 784), (300, 200, 260), (1000, 10, 64), (40, 50, 9000), (5, 4000, 300)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_for_every_thread_count(shape):
    m, n, k = shape
    x, w, b = torch.randn(m, k, requires_grad=True), torch.randn(n, k, requires_grad=True), torch.randn(n)
    b.requires_grad_()

    def step():
        y = F.linear(x, w, b)
        return [y, *torch.autograd.grad(y, (x, w, b), torch.ones_like(y) * 0.3)]

    assert_same_bits_for_every_thread_count(step, (1, 2, 3, 4))


def test_only_the_needed_gradients():
    x, w, g = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5)
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        got = torch.ops.fastnn.linear_backward(g, x, w, mask)
        assert [t is not None for t in got] == mask


def test_transposed_and_overlapping_operands():
    a, b = torch.randn(30, 20), torch.randn(30, 40)
    torch.testing.assert_close(F.mm(a.t(), b), torch.mm(a.t(), b))
    torch.testing.assert_close(F.mm(b.t(), a), torch.mm(b.t(), a))
    row = torch.randn(20)
    torch.testing.assert_close(F.mm(row.expand(7, 20), a.t()), torch.mm(row.expand(7, 20), a.t()))
    window = torch.randn(100).as_strided((10, 20), (3, 1))
    torch.testing.assert_close(F.linear(window, a), torch.nn.functional.linear(window, a))
    torch.testing.assert_close(F.mm(a[::2, ::3], b[:7, ::2]), torch.mm(a[::2, ::3], b[:7, ::2]))


@pytest.mark.parametrize("op", ["linear", "mm", "addmm", "bmm", "matmul"])
def test_autocast_follows_torch(op):
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    if op == "bmm":
        a, b = a[None], b[None]
    args = (torch.randn(4), a, b) if op == "addmm" else (a, b)
    torchs = getattr(torch, op, None) or getattr(torch.nn.functional, op)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = getattr(F, op)(*args), torchs(*args)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
