"""linear."""

import torch.nn.functional as F

from fastnn.functional._call import aten, has_torch_function, op, overridden

_linear = op("linear")


def linear(input, weight, bias=None):
    """input @ weight.T + bias.

    Args:
        input: (..., in_features), any number of leading dimensions; float32, float64, bfloat16 or float16.
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features), contiguous.

    Raises what torch.nn.functional.linear raises. Source: torch.nn.functional.linear.
    """
    if has_torch_function((input, weight, bias)):
        return overridden(linear, F.linear, (input, weight, bias), input, weight, bias)
    try:
        return _linear(input, weight, bias)
    except TypeError:
        return aten(F.linear, input, weight, bias)
