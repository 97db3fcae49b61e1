"""batch_norm and its fused forms: the feature maps of residual networks and a classifier's hidden layer."""

import pytest
import torch
from conftest import check_then_time

SHAPES = [(128, 16, 32, 32), (4, 64, 56, 56), (4, 512, 28, 28), (256, 512)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_batch_norm(benchmark, shape, backward, training, library):
    x = torch.randn(shape, requires_grad=backward)
    weight, bias = (torch.randn(shape[1], requires_grad=backward) for _ in range(2))
    args = (x, torch.zeros(shape[1]), torch.ones(shape[1]), weight, bias, training)
    check_then_time(benchmark, library, "batch_norm", args, backward=backward)
