"""Fake kernels of fastnn::conv2d."""

import torch

from fastnn._fake._common import dense_format, empty_dense, is_empty


def _format(input, weight):
    format = dense_format(input)
    return dense_format(weight) if format == torch.contiguous_format else format


@torch.library.register_fake("fastnn::conv2d")
def _forward(input, weight, bias, stride, padding, dilation, groups):
    if input.dim() == 3:
        return _forward(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    torch._check(input.dim() == 4 and weight.dim() == 4, lambda: "conv2d expects a 4-D input and weight")
    size = [
        (input.size(i + 2) + 2 * padding[i] - dilation[i] * (weight.size(i + 2) - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    shape = (input.size(0), weight.size(0), *size)
    format = _format(input, weight)
    if is_empty(input):  # a fake product with a number, as the kernel makes, would be contiguous
        keeps_layout = shape == input.shape and input.stride(1) == 1 < input.size(1)
        format = torch.channels_last if keeps_layout else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format)


def _grad_input(input, weight):
    format = torch.preserve_format if is_empty(input) else _format(input, weight)
    return torch.empty_like(input, memory_format=format)


@torch.library.register_fake("fastnn::conv2d_backward")
def _backward(grad_output, input, weight, stride, padding, dilation, groups, output_mask):
    return (
        _grad_input(input, weight) if output_mask[0] else None,
        empty_dense(weight) if output_mask[1] else None,
        grad_output.new_empty(weight.size(0)) if output_mask[2] else None,
    )
