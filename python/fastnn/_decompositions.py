"""Every forward op written in torch's own operators, for compilers that know only those."""

import torch
import torch.nn.functional as F

_REDUCTIONS = ("none", "mean", "sum")
_NOTHING = ()  # the shape of results that only backward needs
_TABLE = {}


def decompositions():
    """Every forward op of fastnn in torch's own operators: {op: function}.

    For an exported program that has to hold torch's operators alone:
    `torch.export.export(model, ...).run_decompositions(fastnn.decompositions())`. The table is nobody's but the
    caller's; torch.compile and AOTInductor keep fastnn's ops. torch.onnx.export(model, ...) needs none.

    Returns:
        A new dict. Source: torch.export.ExportedProgram.run_decompositions.
    """
    return dict(_TABLE)


def _decomposition(name):
    """Puts a function into the table as fastnn::<name>."""

    def put(function):
        _TABLE[getattr(torch.ops.fastnn, name).default] = function
        return function

    return put


_SAME = {
    "linear": F.linear, "mm": torch.mm, "bmm": torch.bmm, "matmul": torch.matmul, "addmm": torch.addmm,
    "conv2d": F.conv2d, "relu": torch.relu, "relu_": torch.relu_, "relu6": F.relu6, "relu6_": torch._C._nn.relu6_,
    "leaky_relu": F.leaky_relu, "leaky_relu_": torch._C._nn.leaky_relu_, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "gelu": F.gelu, "silu": F.silu, "silu_": torch._C._nn.silu_,
    "avg_pool2d": F.avg_pool2d, "softmax": torch.softmax, "log_softmax": torch.log_softmax,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
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
    return (torch.relu(y) if relu else y), y.new_empty(_NOTHING)


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
