"""Every forward op written in torch's own operators, for exporters that know only those.

torch.onnx.export(..., dynamo=True) finds these by itself; elsewhere pass them to ExportedProgram.run_decompositions:
torch._decomp.get_decompositions([...]).
"""

import torch
import torch.nn.functional as F
import torch._meta_registrations  # noqa: F401  (reads meta_table once)
from torch._decomp import decomposition_table, meta_table, register_decomposition

_REDUCTIONS = ("none", "mean", "sum")
_NOTHING = ()  # the shape of results that only backward needs


def _decomposition(name):
    """Registers a decomposition of fastnn::<name>, once per process."""
    op = getattr(torch.ops.fastnn, name).default
    # Fake tensors with symbolic sizes prefer a decomposition to the op's fake kernel, whose shapes and strides are the
    # right ones, unless the op stands here.
    meta_table.setdefault(op, op)
    return register_decomposition(op) if op not in decomposition_table else lambda function: function


_SAME = {
    "linear": F.linear, "mm": torch.mm, "bmm": torch.bmm, "matmul": torch.matmul, "addmm": torch.addmm,
    "conv2d": F.conv2d, "relu": torch.relu, "relu_": torch.relu_, "leaky_relu": F.leaky_relu, "sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu, "avg_pool2d": F.avg_pool2d, "softmax": torch.softmax,
    "log_softmax": torch.log_softmax, "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
}  # fmt: skip
for _name, _function in _SAME.items():
    _decomposition(_name)(lambda *args, _function=_function, **kwargs: _function(*args, **kwargs))


@_decomposition("gelu_tanh")
def _gelu_tanh(input):
    return F.gelu(input, approximate="tanh")


@_decomposition("max_pool2d")
def _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode):
    return F.max_pool2d(input, kernel_size, stride or None, padding, dilation, ceil_mode)


@_decomposition("adaptive_max_pool2d")
def _adaptive_max_pool2d(input, output_size):
    return F.adaptive_max_pool2d(input, output_size)


def _after_norm(y, residual, relu):
    y = y if residual is None else y + residual
    return (torch.relu(y) if relu else y), y.new_empty(_NOTHING), y.new_empty(_NOTHING)


@_decomposition("batch_norm_eval")
def _batch_norm_eval(input, weight, bias, running_mean, running_var, eps, residual, relu):
    y = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return _after_norm(y, residual, relu)


@_decomposition("batch_norm_train")
def _batch_norm_train(input, weight, bias, running_mean, running_var, momentum, eps, residual, relu):
    y = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    return _after_norm(y, residual, relu)


@_decomposition("cross_entropy")
def _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing):
    loss = F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss, input.new_empty(_NOTHING)


@_decomposition("nll_loss")
def _nll_loss(input, target, weight, reduction, ignore_index):
    loss = F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction])
    return loss, input.new_empty(_NOTHING)
