"""Fake kernels of batch norm: the output as the kernels read the input, statistics in the accumulation type."""

import torch

from fastnn._fake._common import format_as_it_lies, is_empty


def _empty(input):
    if is_empty(input):
        return torch.empty_like(input)
    format = format_as_it_lies(input) or torch._prims_common.suggest_memory_format(input)
    return torch.empty_like(input, memory_format=format)


def _statistics(input, residual, relu):
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    mask_from_affine = relu and residual is None and input.is_cpu and input.dtype in (torch.float32, torch.float64)
    return input.new_empty((4 if mask_from_affine else 2, input.size(1)), dtype=dtype)


@torch.library.register_fake("fastnn::batch_norm_train")
def _train(input, weight, bias, running_mean, running_var, momentum, eps, residual, relu):
    return _empty(input), _statistics(input, residual, relu)


@torch.library.register_fake("fastnn::batch_norm_eval")
def _eval(input, weight, bias, running_mean, running_var, eps, residual, relu):
    return _empty(input), _statistics(input, residual, relu)


@torch.library.register_fake("fastnn::batch_norm_backward")
def _backward(grad_output, input, weight, statistics, result, training, output_mask):
    none = lambda: input.new_empty(0)  # noqa: E731
    parameter = lambda: statistics.new_empty(input.size(1)) if weight is None else torch.empty_like(weight)  # noqa: E731
    return (
        _empty(input) if output_mask[0] else none(),
        parameter() if output_mask[1] else none(),
        parameter() if output_mask[2] else none(),
        _empty(input) if output_mask[3] else none(),
    )
