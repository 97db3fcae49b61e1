"""softmax and log_softmax."""

import torch
import torch.nn.functional as F

from fastnn.functional._call import aten, has_torch_function, op, overridden

_softmax = op("softmax")
_log_softmax = op("log_softmax")


def softmax(input, dim=None, _stacklevel=3, dtype=None):
    """exp(x - max) / sum exp(x - max) over `dim`.

    Args:
        input: tensor of any shape, float32, float64, bfloat16 or float16.
        dim: dimension to normalise; None picks torch's implicit choice with its warning.
        dtype: cast the input to this dtype first.

    Returns:
        A contiguous tensor of the input's shape, as torch's is.

    Raises what torch.nn.functional.softmax raises. Source: torch.nn.functional.softmax.
    """
    if has_torch_function((input,)):
        return overridden(softmax, F.softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)
    if dim is None:
        dim = F._get_softmax_dim("softmax", input.dim(), _stacklevel)
    try:
        return _softmax(_cast(input, dtype), dim)
    except TypeError:
        return aten(F.softmax, input, dim=dim, dtype=dtype)


def log_softmax(input, dim=None, _stacklevel=3, dtype=None):
    """log(softmax(input, dim)), computed as x - max - log(sum exp(x - max)).

    Args, returns and errors as softmax. Source: torch.nn.functional.log_softmax.
    """
    if has_torch_function((input,)):
        return overridden(log_softmax, F.log_softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)
    if dim is None:
        dim = F._get_softmax_dim("log_softmax", input.dim(), _stacklevel)
    try:
        return _log_softmax(_cast(input, dtype), dim)
    except TypeError:
        return aten(F.log_softmax, input, dim=dim, dtype=dtype)


def _cast(input, dtype):
    if dtype is None:
        return input
    if not isinstance(dtype, torch.dtype):  # Tensor.to() would take a device or another tensor too
        raise TypeError("dtype")
    return input.to(dtype)
