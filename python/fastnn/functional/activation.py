"""relu, relu6, leaky_relu, sigmoid, tanh, gelu and silu."""

import torch
import torch.nn.functional as F
from torch.overrides import has_torch_function_unary

from fastnn.functional._call import aten, op, overridden

_relu = op("relu")
_relu_ = op("relu_")
_relu6 = op("relu6")
_relu6_ = op("relu6_")
_leaky_relu = op("leaky_relu")
_leaky_relu_ = op("leaky_relu_")
_sigmoid = op("sigmoid")
_tanh = op("tanh")
_gelu = {"none": op("gelu"), "tanh": op("gelu_tanh")}
_silu = op("silu")
_silu_ = op("silu_")


def relu(input, inplace=False):
    """max(x, 0), elementwise; NaN passes, and the derivative at 0 is 0.

    Args:
        input: tensor of any shape and strides, float32, float64, bfloat16 or float16.
        inplace: write the result into `input` and return it.

    Returns:
        A tensor of the input's shape and strides.

    Raises what torch.nn.functional.relu raises (in place: also for a leaf that requires a gradient).
    Source: torch.nn.functional.relu.
    """
    if has_torch_function_unary(input):
        return overridden(relu, F.relu, (input,), input, inplace=inplace)
    try:
        return _relu_(input) if inplace else _relu(input)
    except TypeError:
        return aten(F.relu, input, inplace=inplace)


def relu6(input, inplace=False):
    """min(max(x, 0), 6), elementwise; NaN passes, and the derivative at 0 and 6 is 0.

    Args, returns and errors as relu. Source: torch.nn.functional.relu6 (Howard et al., 2017).
    """
    if has_torch_function_unary(input):
        return overridden(relu6, F.relu6, (input,), input, inplace=inplace)
    try:
        return _relu6_(input) if inplace else _relu6(input)
    except TypeError:
        return aten(F.relu6, input, inplace=inplace)


def leaky_relu(input, negative_slope=0.01, inplace=False):
    """x where x > 0, negative_slope * x elsewhere.

    Args:
        input: as in relu.
        negative_slope: the factor below zero, a number.
        inplace: as in relu; torch's own kernel runs where a gradient is needed and the slope is negative.

    Returns:
        A tensor of the input's shape and strides.

    Raises what torch.nn.functional.leaky_relu raises. Source: torch.nn.functional.leaky_relu.
    """
    if has_torch_function_unary(input):
        return overridden(leaky_relu, F.leaky_relu, (input,), input, negative_slope=negative_slope, inplace=inplace)
    try:
        return _leaky_relu_(input, negative_slope) if inplace else _leaky_relu(input, negative_slope)
    except TypeError:
        return aten(F.leaky_relu, input, negative_slope, inplace)


def sigmoid(input):
    """1 / (1 + exp(-x)). Args, returns and errors as relu. Source: torch.nn.functional.sigmoid."""
    if has_torch_function_unary(input):
        return overridden(sigmoid, torch.sigmoid, (input,), input)
    try:
        return _sigmoid(input)
    except TypeError:
        return aten(F.sigmoid, input)


def tanh(input):
    """The hyperbolic tangent. Args, returns and errors as relu. Source: torch.nn.functional.tanh."""
    if has_torch_function_unary(input):
        return overridden(tanh, torch.tanh, (input,), input)
    try:
        return _tanh(input)
    except TypeError:
        return aten(F.tanh, input)


def gelu(input, *, approximate="none"):
    """x times the normal distribution function of x.

    Args:
        input: as in relu.
        approximate: "none", or "tanh" for x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2.

    Returns:
        A tensor of the input's shape and strides.

    On the CPU in float32 and without approximation: within 4 ulp for x > -1, within 300 ulp down to x = -6.

    Raises what torch.nn.functional.gelu raises. Source: torch.nn.functional.gelu (Hendrycks and Gimpel, 2016).
    """
    if has_torch_function_unary(input):
        return overridden(gelu, F.gelu, (input,), input, approximate=approximate)
    try:
        return _gelu[approximate](input)
    except (TypeError, KeyError):
        return aten(F.gelu, input, approximate=approximate)


def silu(input, inplace=False):
    """x / (1 + exp(-x)), also called swish.

    Args:
        input: as in relu.
        inplace: as in relu; torch's own kernel runs where a gradient is needed, which must copy the input.

    Returns:
        A tensor of the input's shape and strides.

    Raises what torch.nn.functional.silu raises. Source: torch.nn.functional.silu (Elfwing et al., 2017).
    """
    if has_torch_function_unary(input):
        return overridden(silu, F.silu, (input,), input, inplace=inplace)
    try:
        return _silu_(input) if inplace else _silu(input)
    except TypeError:
        return aten(F.silu, input, inplace)
