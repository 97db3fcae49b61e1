"""Pooling: the shapes of LeNet, AlexNet, VGG, ResNet, GoogLeNet and DenseNet."""

import pytest
import torch
from conftest import check_then_time

CASES = [
    ("max_pool2d", (64, 10, 24, 24), 2),
    ("max_pool2d", (64, 32, 32, 32), 2),
    ("max_pool2d", (8, 192, 27, 27), 3, 2),
    ("max_pool2d", (4, 64, 112, 112), 3, 2, 1),
    ("max_pool2d", (8, 192, 28, 28), 3, 1, 1),
    ("avg_pool2d", (4, 256, 56, 56), 2),
    ("avg_pool2d", (8, 192, 35, 35), 3, 1, 1),
    ("adaptive_avg_pool2d", (4, 512, 14, 14), 7),
    ("adaptive_avg_pool2d", (8, 512, 7, 7), 1),
    ("adaptive_max_pool2d", (4, 512, 14, 14), 7),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("op, shape, args", [(c[0], c[1], c[2:]) for c in CASES], ids=str)
def test_pool2d(benchmark, op, shape, args, backward, library):
    x = torch.randn(shape, requires_grad=backward)
    check_then_time(benchmark, library, op, (x, *args), backward=backward)
