"""Max, average and adaptive pooling over the last two dimensions."""

import torch
import torch.nn.functional as F

from fastnn.functional._call import aten, has_torch_function, op, overridden

_max_pool2d = op("max_pool2d")
_max_pool2d_with_indices = op("max_pool2d_with_indices")
_avg_pool2d = op("avg_pool2d")
_adaptive_avg_pool2d = op("adaptive_avg_pool2d")
_adaptive_max_pool2d = op("adaptive_max_pool2d")
_adaptive_max_pool2d_with_indices = op("adaptive_max_pool2d_with_indices")
_tracing = torch.compiler.is_dynamo_compiling


def _ints(value):
    """torch.ops wants lists where the eager entry points take ints, tuples, lists and None."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """The maximum of each window; a tie goes to the first element, NaN wins.

    Args:
        input: (C, H, W) or (N, C, H, W), float32, float64, bfloat16 or float16; contiguous or channels_last.
        kernel_size, stride, padding, dilation: an int or (height, width); stride None is the kernel size.
        ceil_mode: keep a last window that begins inside the input but ends outside.
        return_indices: also return the int64 positions of the maxima in their (H, W) planes.

    Returns:
        (N, C, OH, OW) in the input's memory format, or that and the indices.

    Raises what torch.nn.functional.max_pool2d raises. Source: torch.nn.functional.max_pool2d.
    """
    if has_torch_function((input,)):
        return overridden(
            max_pool2d, F.max_pool2d, (input,), input, kernel_size, stride=stride, padding=padding, dilation=dilation,
            ceil_mode=ceil_mode, return_indices=return_indices,
        )  # fmt: skip
    function = _max_pool2d_with_indices if return_indices else _max_pool2d
    try:
        if _tracing():
            return function(input, _ints(kernel_size), _ints(stride), _ints(padding), _ints(dilation), ceil_mode)
        return function(input, kernel_size, stride, padding, dilation, ceil_mode)
    except TypeError:
        return aten(F.max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """The mean of each window.

    Args:
        input: (C, H, W) or (N, C, H, W), float32, float64, bfloat16 or float16; contiguous or channels_last.
        kernel_size, stride, padding: an int or (height, width); stride None is the kernel size.
        ceil_mode: keep a last window that begins inside the input but ends outside.
        count_include_pad: count the zeros of the padding in the divisor.
        divisor_override: divide by this instead of by the window's size.

    Returns:
        (N, C, OH, OW) in the input's memory format.

    Raises what torch.nn.functional.avg_pool2d raises. Source: torch.nn.functional.avg_pool2d.
    """
    if has_torch_function((input,)):
        return overridden(
            avg_pool2d, F.avg_pool2d, (input,),
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
        )  # fmt: skip
    try:
        if _tracing():
            return _avg_pool2d(
                input, _ints(kernel_size), _ints(stride), _ints(padding), ceil_mode, count_include_pad, divisor_override
            )
        return _avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    except TypeError:
        return aten(F.avg_pool2d, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _plane(output_size, input):
    """(height, width) of an adaptive output size: an int, or two of which None is the input's own."""
    if isinstance(output_size, int):
        return output_size, output_size
    h, w = output_size
    shape = input.shape
    if len(shape) < 3:
        raise TypeError
    return shape[-2] if h is None else h, shape[-1] if w is None else w


def adaptive_avg_pool2d(input, output_size):
    """The mean of each of OH x OW windows that cover the input evenly.

    Args:
        input: (C, H, W) or (N, C, H, W), float32, float64, bfloat16 or float16; contiguous or channels_last.
        output_size: an int or (OH, OW); None is the input's own size.

    Returns:
        (N, C, OH, OW) in the input's memory format.

    Raises what torch.nn.functional.adaptive_avg_pool2d raises. Source: torch.nn.functional.adaptive_avg_pool2d.
    """
    if has_torch_function((input,)):
        return overridden(adaptive_avg_pool2d, F.adaptive_avg_pool2d, (input,), input, output_size)
    try:
        h, w = _plane(output_size, input)
        return _adaptive_avg_pool2d(input, [h, w]) if _tracing() else _adaptive_avg_pool2d(input, h, w)
    except (AttributeError, TypeError, ValueError):
        return aten(F.adaptive_avg_pool2d, input, output_size)


def adaptive_max_pool2d(input, output_size, return_indices=False):
    """The maximum of each of OH x OW windows that cover the input evenly; ties and NaN as max_pool2d.

    Args:
        input: (C, H, W) or (N, C, H, W), float32, float64, bfloat16 or float16; contiguous or channels_last.
        output_size: an int or (OH, OW); None is the input's own size.
        return_indices: also return the int64 positions of the maxima in their (H, W) planes.

    Returns:
        (N, C, OH, OW) in the input's memory format, or that and the indices.

    Raises what torch.nn.functional.adaptive_max_pool2d raises. Source: torch.nn.functional.adaptive_max_pool2d.
    """
    if has_torch_function((input,)):
        arguments = (input, output_size, return_indices)
        return overridden(adaptive_max_pool2d, F.adaptive_max_pool2d, (input,), *arguments)
    function = _adaptive_max_pool2d_with_indices if return_indices else _adaptive_max_pool2d
    try:
        h, w = _plane(output_size, input)
        return function(input, [h, w]) if _tracing() else function(input, h, w)
    except (AttributeError, TypeError, ValueError):
        return aten(F.adaptive_max_pool2d, input, output_size, return_indices)
