"""Pointwise activations: a tiny call, a classifier's hidden layer, and a feature map."""

import pytest
import torch
from conftest import check_then_time

OPS = ["relu", "relu6", "leaky_relu", "sigmoid", "tanh", "gelu", "silu"]
SHAPES = [(16,), (64, 512), (4, 64, 56, 56)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_activation(benchmark, op, shape, backward, library):
    x = torch.randn(shape, requires_grad=backward)
    check_then_time(benchmark, library, op, (x,), backward=backward)
