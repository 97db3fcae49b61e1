"""conv2d against figures worked out by hand, its module's padding modes, autocast and in-place neighbours."""

import pytest
import torch

import fastnn
from fastnn import functional as F

IMAGE = [[3, 4, 6, 5, 7], [2, 4, 6, 8, 2], [1, 6, 7, 8, 4], [9, 7, 4, 6, 2], [3, 7, 5, 4, 1]]


def image_and_kernel():
    x = torch.tensor(IMAGE, dtype=torch.float32).view(1, 1, 5, 5)
    return x, torch.arange(1.0, 10.0).view(1, 1, 3, 3).requires_grad_()


@pytest.mark.parametrize(
    "options, output, gradient",
    [
        (
            {"padding": 1},
            [
                [91, 168, 224, 215, 127],
                [114, 211, 295, 262, 149],
                [192, 259, 282, 214, 122],
                [194, 251, 253, 169, 86],
                [96, 112, 110, 68, 31],
            ],
            [86, 101, 86, 105, 121, 103, 87, 96, 81],
        ),
        ({"stride": 2}, [[211, 262], [251, 169]], [17, 23, 24, 21, 25, 14, 16, 25, 17]),
    ],
    ids=["padding", "stride"],
)
def test_five_by_five(options, output, gradient):
    x, w = image_and_kernel()
    y = F.conv2d(x, w, **options)
    assert y[0, 0].tolist() == output
    y.sum().backward()
    assert w.grad.flatten().tolist() == gradient


def test_output_shapes():
    assert fastnn.Conv2d(5, 10, 3)(torch.randn(1, 5, 100, 100)).shape == (1, 10, 98, 98)
    stacked = torch.nn.Sequential(*(fastnn.Conv2d(1, 1, 3, dilation=d) for d in (1, 2, 4)))
    assert stacked(torch.randn(1, 1, 15, 15)).shape == (1, 1, 1, 1)


def test_pointwise_is_a_matrix_product():
    x = torch.randn(2, 7, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    w = torch.randn(9, 7, 1, 1, dtype=torch.float64)
    y = F.conv2d(x, w).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, x.permute(0, 2, 3, 1) @ w[:, :, 0, 0].T, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
def test_padding_modes(mode, padding):
    ours = fastnn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
    theirs = torch.nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 7, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs)
    assert not fastnn.fallbacks()


def test_backward_does_not_need_the_output():
    layer = fastnn.Conv2d(2, 3, 3)
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    torch.nn.functional.relu_(layer(x)).sum().backward()
    twin = torch.nn.Conv2d(2, 3, 3)
    twin.load_state_dict(layer.state_dict())
    y = x.detach().clone().requires_grad_()
    torch.nn.functional.relu_(twin(y)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


def test_weights_are_read_afresh():
    layer = fastnn.Conv2d(2, 3, 3)
    x = torch.randn(1, 2, 6, 6)
    layer(x)
    layer.weight.data.fill_(1.0)
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias))


def test_autocast():
    layer = fastnn.Conv2d(2, 3, 3)
    x = torch.randn(1, 2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding_with_a_bias_of_another_dtype_is_torchs(padding):
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 1, 5, 5), (2, 1, 3, 3)))
    ours, theirs = (f.conv2d(x, w, torch.ones(2), padding=padding) for f in (fastnn.functional, torch.nn.functional))
    torch.testing.assert_close(ours, theirs)
