"""cross_entropy and nll_loss: classifiers, language models, segmentation."""

import pytest
import torch
from conftest import check_then_time

SHAPES = [(64, 10), (256, 10), (128, 100), (128, 1000), (32, 32000), (4, 21, 64, 64)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_loss(benchmark, op, shape, backward, library):
    x = torch.randn(shape, requires_grad=backward)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    check_then_time(benchmark, library, op, (x, target), backward=backward)
