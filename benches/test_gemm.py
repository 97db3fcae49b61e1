"""linear, mm and bmm: classifier heads, multi-layer perceptrons, square and skinny products."""

import pytest
import torch
from conftest import check_then_time

LINEAR = [(64, 784, 512), (64, 320, 10), (1, 784, 512), (8, 1024, 1024), (32, 2048, 1000), (1024, 1024, 1024)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("shape", LINEAR, ids=lambda s: "x".join(map(str, s)))
def test_linear(benchmark, shape, backward, library):
    m, k, n = shape
    x, w, b = (torch.randn(s, requires_grad=backward) for s in ((m, k), (n, k), (n,)))
    check_then_time(benchmark, library, "linear", (x, w, b), backward=backward)


@pytest.mark.parametrize("shape", [(64, 64, 64), (512, 512, 512), (2, 700, 300)], ids=lambda s: "x".join(map(str, s)))
def test_mm(benchmark, shape, library):
    m, k, n = shape
    check_then_time(benchmark, library, "mm", (torch.randn(m, k), torch.randn(k, n)))


def test_bmm(benchmark, library):
    check_then_time(benchmark, library, "bmm", (torch.randn(32, 64, 64), torch.randn(32, 64, 64)))
