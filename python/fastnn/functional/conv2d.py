"""conv2d."""

import warnings

import torch
import torch.nn.functional as F

from fastnn.functional._call import aten, has_torch_function, op, overridden

_conv2d = op("conv2d")
_warned_of_copy = False


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """2-D convolution (cross-correlation) of a batch of images with a bank of kernels.

    Args:
        input: [N, C, H, W] or [C, H, W], float32, float64, bfloat16 or float16; contiguous or channels_last.
        weight: [K, C / groups, R, S], the input's dtype.
        bias: [K] or None.
        stride, dilation: an int or a pair.
        padding: an int, a pair, "valid" (none) or "same" (the output has the input's size; stride 1 only).
        groups: input and output channels are split into this many independent groups.

    Returns:
        [N, K, P, Q] (or [K, P, Q]) in channels_last where the input or the weight is,
        P = (H + 2 pad - dilation (R - 1) - 1) // stride + 1.

    Raises what torch.nn.functional.conv2d raises. Source: torch.nn.functional.conv2d.
    """
    if has_torch_function((input, weight, bias)):
        arguments = (input, weight, bias, stride, padding, dilation, groups)
        return overridden(conv2d, F.conv2d, arguments[:3], *arguments)
    try:
        if isinstance(padding, str):
            mixed = weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype)
            if mixed and not torch.is_autocast_enabled(input.device.type):  # torch takes some with names alone
                raise TypeError("mixed dtypes")
            input, padding = _pad(input, weight, stride, padding, dilation)
        return _conv2d(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    except (AttributeError, TypeError):
        # torch's error names the arguments it got: leave out those that were left to their defaults.
        rest = [bias, stride, padding, dilation, groups]
        for default in (1, 1, 0, 1, None):
            if rest[-1] is not default:
                break
            rest.pop()
        return aten(F.conv2d, input, weight, *rest)


def _pair(value):
    if not isinstance(value, (tuple, list)):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else value


def _pad(input, weight, stride, padding, dilation):
    """The input and the pair of ints that padding "valid" or "same" stands for."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same" or weight.dim() != 4 or any(s != 1 for s in _pair(stride)):
        raise TypeError(padding)
    dilation = _pair(dilation)
    if len(dilation) != 2 or any(type(d) is not int for d in dilation):
        raise TypeError(dilation)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):  # the extra row or column goes below and to the right
        if input.dim() not in (3, 4):  # before its size changes, which torch's error names
            raise TypeError(input)
        _warn_of_copy()
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)


def _warn_of_copy():
    """Once, as torch does."""
    global _warned_of_copy
    if _warned_of_copy or torch.compiler.is_compiling():
        return
    _warned_of_copy = True
    warnings.warn(
        "Using padding='same' with even kernel lengths and odd dilation may require a zero-padded copy of the input be "
        "created",
        stacklevel=3,
    )
