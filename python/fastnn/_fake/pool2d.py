"""Fake kernels of the pooling ops."""

import torch

from fastnn._fake._common import dense_format


def _at(values, i):
    """The i-th of two ints, or the only one."""
    return values[min(i, len(values) - 1)]


def _windows(input, kernel_size, stride, padding, dilation, ceil_mode):
    """Size of the pooled plane."""
    out = []
    for i in (0, 1):
        k, p, d = _at(kernel_size, i), _at(padding, i), _at(dilation, i)
        s = _at(stride, i) if len(stride) else k
        size = input.shape[i - 2]
        n = (size + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (n - 1) * s >= size + p:
            n -= 1
        out.append(n)
    return out


def _empty(input, plane, dtype=None, channels_last=None):
    """An empty tensor like `input` with another plane; its format is the input's, or as backward was told."""
    format = dense_format(input)
    if channels_last is not None:
        format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (*input.shape[:-2], *plane), dtype=dtype or input.dtype, device=input.device, memory_format=format
    )


def _offset_type(taps):
    return torch.int32 if taps > 255 else torch.uint8


@torch.library.register_fake("fastnn::max_pool2d")
def _max(input, kernel_size, stride, padding, dilation, ceil_mode):
    return _empty(input, _windows(input, kernel_size, stride, padding, dilation, ceil_mode))


@torch.library.register_fake("fastnn::max_pool2d_with_offsets")
def _max_with_offsets(input, kernel_size, stride, padding, dilation, ceil_mode):
    plane = _windows(input, kernel_size, stride, padding, dilation, ceil_mode)
    return _empty(input, plane), _empty(input, plane, _offset_type(kernel_size[0] * kernel_size[-1]))


@torch.library.register_fake("fastnn::adaptive_max_pool2d")
@torch.library.register_fake("fastnn::adaptive_avg_pool2d")
def _adaptive(input, output_size):
    return _empty(input, output_size)


@torch.library.register_fake("fastnn::adaptive_max_pool2d_with_offsets")
def _adaptive_max_with_offsets(input, output_size):
    taps = 1
    for size, out in zip(input.shape[-2:], output_size, strict=True):
        taps *= min(size // out + min(size % out, 2), size)
    return _empty(input, output_size), _empty(input, output_size, _offset_type(taps))


@torch.library.register_fake("fastnn::max_pool2d_indices")
def _indices(offsets, input_size, kernel_size, stride, padding, dilation, channels_last):
    return _empty(offsets, offsets.shape[-2:], torch.int64, channels_last)


@torch.library.register_fake("fastnn::max_pool2d_backward")
def _max_backward(grad_output, offsets, input_size, kernel_size, stride, padding, dilation, channels_last):
    return _empty(grad_output, input_size, channels_last=channels_last)


@torch.library.register_fake("fastnn::avg_pool2d")
def _avg(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    return _empty(input, _windows(input, kernel_size, stride, padding, [1], ceil_mode))


@torch.library.register_fake("fastnn::avg_pool2d_backward")
def _avg_backward(
    grad_output, input_size, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, channels_last
):
    return _empty(grad_output, input_size, channels_last=channels_last)


@torch.library.register_fake("fastnn::adaptive_avg_pool2d_backward")
def _adaptive_avg_backward(grad_output, input_size, channels_last):
    return _empty(grad_output, input_size, channels_last=channels_last)
