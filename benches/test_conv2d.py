"""conv2d: the layers of the MNIST and CIFAR10 networks, ResNet-20 and the large image networks."""

import pytest
import torch
from conftest import check_then_time

# name: (input shape, weight shape, stride, padding, groups)
LAYERS = {
    "mnist-1": ((64, 1, 28, 28), (10, 1, 5, 5), 1, 0, 1),
    "mnist-2": ((64, 10, 12, 12), (20, 10, 5, 5), 1, 0, 1),
    "cifar10-2": ((64, 32, 16, 16), (32, 32, 5, 5), 1, 2, 1),
    "resnet20-16": ((128, 16, 32, 32), (16, 16, 3, 3), 1, 1, 1),
    "resnet50-pointwise": ((1, 256, 56, 56), (64, 256, 1, 1), 1, 0, 1),
    "mobilenet-depthwise": ((1, 96, 112, 112), (96, 1, 3, 3), 2, 1, 96),
    "vgg16-512": ((1, 512, 14, 14), (512, 512, 3, 3), 1, 1, 1),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("layer", LAYERS)
def test_conv2d(benchmark, layer, backward, library):
    x_shape, w_shape, stride, padding, groups = LAYERS[layer]
    x = torch.randn(x_shape, requires_grad=backward)
    w = torch.randn(w_shape, requires_grad=backward)
    b = torch.randn(w_shape[0], requires_grad=backward)
    check_then_time(benchmark, library, "conv2d", (x, w, b, stride, padding, 1, groups), backward=backward)
