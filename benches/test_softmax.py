"""softmax and log_softmax: the shapes of classifiers, attention and language models."""

import pytest
import torch
from conftest import check_then_time

SHAPES = [(64, 10), (256, 100), (128, 1000), (32, 32000), (8, 8, 128, 128)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_softmax(benchmark, op, shape, backward, library):
    x = torch.randn(shape, requires_grad=backward)
    check_then_time(benchmark, library, op, (x, -1), backward=backward)
