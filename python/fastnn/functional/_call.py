"""How a functional reaches its op: straight into C++ when eager, through torch.ops while torch.compile traces."""

import torch
import torch.fx
from torch.overrides import handle_torch_function, has_torch_function

from fastnn import _C

__all__ = ["aten", "has_torch_function", "op", "overridden"]

# Tensor classes that take any function as it comes; torch.fx records it.
_PLAIN = (
    torch.Tensor.__torch_function__.__func__,
    torch.fx.Proxy.__torch_function__.__func__,
    torch._C._disabled_torch_function_impl,
)


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


def overridden(ours, theirs, tensors, *args, **kwargs):
    """A call that a mode, or the class of one of `tensors`, wants to see (torch.overrides.has_torch_function).

    A class with a __torch_function__ of its own (quantised weights, masked and nested tensors) looks up torch's
    functions: the call becomes `theirs`. For modes, plain subclasses and torch.fx it stays `ours`.
    """
    if any(_method(t) not in _PLAIN for t in tensors):
        return aten(theirs, *args, **kwargs)
    return handle_torch_function(ours, tensors, *args, **kwargs)


def _method(t):
    method = getattr(type(t), "__torch_function__", torch._C._disabled_torch_function_impl)
    return getattr(method, "__func__", method)


def aten(function, *args, **kwargs):
    """Calls torch's own function for what the kernels do not take, and counts it in fastnn.fallbacks()."""
    if not torch.compiler.is_dynamo_compiling():  # a compiled graph calls torch's function and no Python
        _C.note_fallback(function.__name__, "ONNX export" if torch.onnx.is_in_onnx_export() else "arguments")
    return function(*args, **kwargs)
