"""Matrix products of random shapes and strides, of every algorithm, on every instruction set, against float64."""

import random

import pytest
import torch
from compare import assert_same_bits_for_every_thread_count

import fastnn
from fastnn import functional as F

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 15, 16, 17, 24, 31, 32, 33, 40, 65, 100, 130, 257)


@pytest.fixture(params=fastnn._C.isas())
def isa(request):
    before = fastnn._C.isa()
    fastnn._C.set_isa(request.param)
    yield request.param
    fastnn._C.set_isa(before)


def matrix(pick, rows, columns, dtype):
    """A matrix that runs along its rows, along its columns, or along neither."""
    kind = pick(("rows", "rows", "columns", "columns", "neither"))
    if kind == "neither":
        return torch.randn(2 * rows, 3 * columns, dtype=dtype)[::2, ::3]
    wide = pick((0, 0, 3))
    if kind == "columns":
        return torch.randn(columns, rows + wide, dtype=dtype)[:, :rows].t()
    return torch.randn(rows, columns + wide, dtype=dtype)[:, :columns]


def close(result, expected, k, dtype):
    # Rounding grows with the square root of the terms; the stored result is rounded once more.
    bound = 8 * (k + 1) ** 0.5 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound += torch.finfo(dtype).eps
    return bool(((result.double() - expected).abs() <= bound * (4 + expected.abs())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_random_products(isa, dtype):
    pick, seen = random.Random(1).choice, set()
    for _ in range(500):
        m, k, n = pick(SIDES), pick(SIDES), pick(SIDES)
        a, b = matrix(pick, m, k, dtype), matrix(pick, k, n, dtype)
        seen.add(fastnn._C.gemm_algorithm(a, b))
        expected = a.double() @ b.double()
        which = (m, k, n, a.stride(), b.stride())
        assert close(F.mm(a, b), expected, k, dtype), which
        alpha, beta, shape = pick((1, 1, -2)), pick((1, 1, 0.5)), pick(((n,), (n,), (m, n), (m, 1), (1,)))
        added = torch.randn(shape, dtype=dtype)
        ours = F.addmm(added, a, b, beta=beta, alpha=alpha)
        assert close(ours, beta * added.double() + alpha * expected, k, dtype), (*which, alpha, beta, shape)
    columns = {"by columns"} if isa == "avx512" and dtype != torch.bfloat16 else set()
    assert seen == {"dot", "rows", "outer", "in place", "packed"} | columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_products_by_columns(isa, dtype):
    """Full and partial tiles, one and several sums and blocks of k, rows further apart than they are long."""
    shapes = [(48, 517, 2100), (63, 170, 2050)]
    if isa == "avx2":  # shorter ones are dot products
        shapes += [(16, 500, 1100), (32, 1025, 2304)]
    else:
        shapes += [(32, 324, 500), (32, 133, 384), (64, 100, 1030), (63, 170, 400), (64, 1025, 784)]
    if isa == "avx512":
        shapes += [(14, 64, 32), (64, 64, 21), (96, 40, 200), (16, 1030, 2051), (128, 20, 77), (96, 10, 50)]
        shapes += [(128, 300, 1500), (250, 60, 257)]
    for m, n, k in shapes:
        x, weight = torch.randn(m, k + 3, dtype=dtype)[:, :k], torch.randn(n, k + 5, dtype=dtype)[:, :k]
        assert isa == "baseline" or fastnn._C.gemm_algorithm(x, weight.t()) == "by columns", (m, n, k)
        expected = x.double() @ weight.double().t()
        assert close(F.mm(x, weight.t()), expected, k, dtype), (m, n, k)
        for other in (torch.randn(n, dtype=dtype), torch.randn(m, n + 2, dtype=dtype)[:, :n]):
            assert close(F.addmm(other, x, weight.t()), other.double() + expected, k, dtype), (m, n, k)
        other[0, 0] = float("nan")
        ours = F.addmm(other, x, weight.t())
        assert ours.isnan().nonzero().tolist() == [[0, 0]]


def test_dot_products_by_tiles_of_every_size(isa):
    for m in (1, 2, 3, 4, 5, 7, 12, 13, 38, 64):
        for n, k in ((4, 300), (19, 1029), (33, 96)):
            x, weight = torch.randn(m, k), torch.randn(n, k)
            assert isa == "avx512" or n < 19 or fastnn._C.gemm_algorithm(x, weight.t()) == "dot", (m, n, k)
            assert close(F.mm(x, weight.t()), x.double() @ weight.double().t(), k, torch.float32), (m, n, k)


def test_bits_do_not_depend_on_threads(isa):
    """Shapes that threads cut in the middle of a tile, of a pair of rows or of a panel of columns."""
    pick = random.Random(2).choice
    shapes = [(1025, 1, 96, torch.float32), (1025, 1, 40, torch.float64), (384, 300, 392, torch.float32)]
    for _ in range(100):
        m, k, n = pick((64, 98, 127, 200, 513, 1025)), pick((1, 2, 3, 33, 300, 600)), pick((*SIDES, 392, 513))
        shapes.append((m, k, n, pick((torch.float32, torch.float64, torch.bfloat16))))
    for m, k, n, dtype in shapes:
        layer = matrix(pick, m, k, dtype), matrix(pick, n, k, dtype), torch.randn(n, dtype=dtype)
        assert_same_bits_for_every_thread_count(lambda layer=layer: [F.linear(*layer)], counts=(1, 2, 3, 5))


def test_workspaces_are_bounded_for_every_number_of_threads(isa):
    for count in (1, 3, 48, 200):
        torch.set_num_threads(count)  # conftest.py restores it
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for m, k, n in ((8192, 8192, 8192), (100, 10**6, 100), (10**6, 64, 512), (600, 3000, 700)):
                a, b = torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype)
                for batch in (1, 1000):
                    assert 0 <= fastnn._C.gemm_workspace(a, b, batch) <= 32 * 2**20


@pytest.mark.parametrize("shape", [(2050, 40, 1552), (2049, 300, 1552), (2049, 7, 1551), (4099, 2, 1552)], ids=str)
def test_large_results(isa, shape):
    """More than the caches keep: of one sum, which may go past them, of two, of rows that are no whole lines."""
    m, k, n = shape
    a, b = torch.randn(k, m).t(), torch.randn(k, n)
    expected = a.double() @ b.double()
    assert close(F.mm(a, b), expected, k, torch.float32)
    assert_same_bits_for_every_thread_count(lambda: [F.mm(a, b)], counts=(1, 2, 3))
    out = torch.empty(m * n + 1)[1:].view(m, n)  # lines begin elsewhere
    assert close(F.mm(a, b, out=out), expected, k, torch.float32)


def test_few_rows_of_a_large_matrix(isa):
    """One tile of rows, two and more; several sums; rows of whole lines, of parts of lines and 4 KB apart."""
    for m in (5, 6, 9, 14, 15, 28, 29, 40):
        for k, n in ((300, 517), (5, 32768), (4100, 40), (130, 1024), (31, 4231), (33, 4224)):
            a, b = torch.randn(m, k), torch.randn(k, n)
            which = fastnn._C.gemm_algorithm(a, b)
            assert isa != "avx512" or which == ("in place" if m <= 28 else "packed"), (m, k, n)
            assert close(F.mm(a, b), a.double() @ b.double(), k, torch.float32), (m, k, n)
        assert_same_bits_for_every_thread_count(lambda a=a, b=b: [F.mm(a, b)], counts=(1, 2, 5))


@pytest.mark.parametrize("n", [1, 2, 5, 10, 24])
def test_layers_of_few_outputs_are_dot_products(n):
    x, weight = torch.randn(100, 256), torch.randn(n, 256)
    wide = fastnn._C.isa() == "avx512"
    assert fastnn._C.gemm_algorithm(x, weight.t()) == ("dot" if n <= 12 or wide else "packed")


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sums_of_few_terms_cross_blocks_of_columns(isa, k):
    for m in (1, 3, 7):
        x, weight, bias = torch.randn(m, k), torch.randn(2100, k), torch.randn(2100)
        expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert close(F.linear(x, weight, bias), expected, k, torch.float32)


@pytest.mark.parametrize("shape", [(2, 67), (37, 784), (1025, 1030)], ids=str)
def test_one_term_is_rounded_once(isa, shape):
    m, n = shape
    x, y = torch.randn(m, 1), torch.randn(1, n)
    assert torch.equal(F.mm(x, y), x * y)
    assert torch.equal(F.addmm(y[0], x, y), x * y + y)


@pytest.mark.parametrize("shapes", [((64,), (64, 300)), ((5, 64), (64,)), ((64,), (64,)), ((40, 9), (9, 33))], ids=str)
def test_gradients_of_a_sum(isa, shapes):
    """One value seen as many, which is spread out first, and the derivatives of a product of vectors."""
    a, b = (torch.randn(s, requires_grad=True) for s in shapes)
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    for got, expected in zip(
        torch.autograd.grad(F.matmul(a, b).sum(), (a, b)),
        torch.autograd.grad(torch.matmul(*exact).sum(), exact),
        strict=True,
    ):
        assert close(got, expected, 300, torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 7, 255, 256, 257, 700])
def test_bias_gradients(isa, rows):
    for columns in (1, 3, 10, 16, 17, 48, 64, 100, 127, 128, 129, 300):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            g = torch.randn(rows, columns, dtype=dtype)
            weight, bias = torch.zeros(columns, 2, dtype=dtype), torch.zeros(columns, dtype=dtype, requires_grad=True)
            y = F.linear(torch.zeros(rows, 2, dtype=dtype), weight, bias)
            for gradient in (g, g.t().contiguous().t()):
                (ours,) = torch.autograd.grad(y, bias, gradient, retain_graph=True)
                assert close(ours, g.double().sum(0), rows, dtype), (rows, columns, dtype)


@pytest.mark.parametrize("rows", [300, 1200, 40000])
def test_bias_gradients_of_one_row_repeated(isa, rows):
    """Rounding errors of equal terms add up: our sum is as near as torch's."""
    for columns in (1, 5, 88, 183):
        g, weight = torch.randn(columns).expand(rows, columns), torch.zeros(columns, 2)
        errors = []
        for linear in (F.linear, torch.nn.functional.linear):
            bias = torch.zeros(columns, requires_grad=True)
            (ours,) = torch.autograd.grad(linear(torch.zeros(rows, 2), weight, bias), bias, g)
            errors.append((ours - g.double().sum(0)).abs().max().item())
        floor = 4 * torch.finfo(torch.float32).eps * rows * g.abs().max().item()
        assert errors[0] <= 2 * errors[1] + floor, (rows, columns)
