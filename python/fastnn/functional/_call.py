"""How a functional reaches its op: straight into C++ when eager, through torch.ops while torch.compile traces."""

import torch
from torch.overrides import handle_torch_function, has_torch_function

from fastnn import _C

__all__ = ["aten", "handle_torch_function", "has_torch_function", "op"]


def op(name, traced_result=None):
    """A callable for the op `fastnn::<name>`.

    Eager calls enter C++ through pybind11 (under 1 us; torch.ops takes several). While Dynamo traces, the same call
    is recorded as torch.ops.fastnn.<name>, of whose results `traced_result` picks the one the eager entry returns.
    """
    eager = getattr(_C, name)
    traced = getattr(torch.ops.fastnn, name)
    tracing = torch.compiler.is_dynamo_compiling

    if traced_result is None:

        def call(*args):
            return (traced if tracing() else eager)(*args)
    else:

        def call(*args):
            return traced(*args)[traced_result] if tracing() else eager(*args)

    return call


def aten(function, *args, **kwargs):
    """Calls torch's own function for what the kernels do not take, and counts it in fastnn.fallbacks()."""
    if not torch.compiler.is_dynamo_compiling():  # a compiled graph calls torch's function and no Python
        _C.note_fallback(function.__name__, "ONNX export" if torch.onnx.is_in_onnx_export() else "arguments")
    return function(*args, **kwargs)
