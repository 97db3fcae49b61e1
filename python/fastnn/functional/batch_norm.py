"""batch_norm, and its forms with a ReLU and with a residual and a ReLU behind it."""

import torch.nn.functional as F

from fastnn.functional._call import aten, has_torch_function, op, overridden

_train = op("batch_norm_train", traced_result=0)
_eval = op("batch_norm_eval", traced_result=0)


def _call(input, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu):
    """The op's output; raises TypeError or ValueError for what only torch's own function may answer."""
    if type(training) is not bool or not isinstance(momentum, (int, float)):
        raise TypeError("training or momentum")
    for statistic in (running_mean, running_var):
        if statistic is not None and statistic.requires_grad:
            raise ValueError("running statistics have no gradient")
    if training:
        if eps <= 0.0:
            raise ValueError("eps")
        size = input.size()
        F._verify_batch_size(size)
        return _train(input, weight, bias, running_mean, running_var, momentum, eps, residual, relu)
    if eps < 0.0 or running_mean is None or running_var is None:
        raise ValueError("eps or running statistics")
    return _eval(input, weight, bias, running_mean, running_var, eps, residual, relu)


def _norm_relu(*args, **kwargs):
    return F.relu(F.batch_norm(*args, **kwargs))


def _norm_add_relu(input, residual, *args, **kwargs):
    return F.relu(F.batch_norm(input, *args, **kwargs) + residual)


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05):
    """(x - mean) / sqrt(var + eps) * weight + bias, per channel (dimension 1).

    Args:
        input: [N, C, ...], rank >= 2, float32, float64, bfloat16 or float16; contiguous and channels_last run as they
            lie in memory.
        running_mean, running_var: [C] or None. Training moves them in place by `momentum` towards the batch's mean and
            unbiased variance; evaluation normalises with them.
        weight, bias: [C] or None. They and the running statistics share the input's dtype, or are float32 beside a
            16-bit input.
        training: normalise with the batch's mean and biased variance.
        momentum: the new batch's share in the running statistics.
        eps: added to the variance.

    Returns:
        A tensor of the input's shape and dtype, in its memory format.

    Raises what torch.nn.functional.batch_norm raises, among it ValueError for one value per channel in training.
    Source: torch.nn.functional.batch_norm (Ioffe and Szegedy, 2015).
    """
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function(tensors):
        return overridden(
            batch_norm, F.batch_norm, tensors,
            input, running_mean, running_var, weight=weight, bias=bias, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    try:
        return _call(input, running_mean, running_var, weight, bias, training, momentum, eps, None, False)
    except (TypeError, ValueError, AttributeError):
        return aten(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm_relu(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05):
    """relu(batch_norm(...)) in the same passes over memory; backward takes the ReLU's mask from the sign of the output,
    which it computes again where that is less to read.

    Args, returns and errors as batch_norm. Source: torch.nn.functional.batch_norm and relu.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function(tensors):
        return overridden(
            batch_norm_relu, _norm_relu, tensors,
            input, running_mean, running_var, weight=weight, bias=bias, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    try:
        return _call(input, running_mean, running_var, weight, bias, training, momentum, eps, None, True)
    except (TypeError, ValueError, AttributeError):
        return F.relu(aten(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps))


def batch_norm_add_relu(
    input, residual, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05
):
    """relu(batch_norm(...) + residual), the end of a residual block, in the same passes over memory.

    Args:
        residual: a tensor of the input's shape and dtype (any other that can be added runs on torch's kernels).
        The others, returns and errors as batch_norm.

    Source: torch.nn.functional.batch_norm and relu (He et al., 2015).
    """
    tensors = (input, residual, running_mean, running_var, weight, bias)
    if has_torch_function(tensors):
        return overridden(
            batch_norm_add_relu, _norm_add_relu, tensors, input, residual, running_mean, running_var, weight=weight,
            bias=bias, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    try:
        if residual is None:
            raise TypeError("residual")
        return _call(input, running_mean, running_var, weight, bias, training, momentum, eps, residual, True)
    except (TypeError, ValueError, AttributeError):
        y = aten(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)
        return F.relu(y + residual)
