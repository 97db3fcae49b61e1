"""Formulas for torch.utils.flop_counter.FlopCounterMode: the counts torch gives for its own operators."""

from math import prod

import torch
from torch.utils.flop_counter import conv_backward_flop, conv_flop, flop_registry, register_flop_formula


def _formula(*names):
    """Registers a formula for the ops fastnn::<name>, once per process."""
    ops = [getattr(torch.ops.fastnn, name) for name in names]
    return register_flop_formula([op for op in ops if op not in flop_registry])


@_formula("linear")
def _linear(input, weight, bias=None, out_shape=None):
    return 2 * prod(input) * weight[0]


@_formula("linear_backward")
def _linear_backward(grad_output, input, weight, mask, out_shape=None):
    return (bool(mask[0]) + bool(mask[1])) * 2 * prod(input) * weight[0]


@_formula("mm", "bmm", "matmul")
def _matmul(a, b, out_shape=None):
    return 2 * prod(out_shape) * a[-1]


@_formula("addmm")
def _addmm(input, a, b, *, beta=1, alpha=1, out_shape=None):
    return 2 * prod(out_shape) * a[-1]


@_formula("conv2d")
def _conv2d(input, weight, bias, stride, padding, dilation, groups, out_shape=None):
    if len(input) == 3:
        input, out_shape = (1, *input), (1, *out_shape)
    return conv_flop(input, weight, bias, stride, padding, dilation, False, out_val=torch.Size(out_shape))


@_formula("conv2d_backward")
def _conv2d_backward(grad_output, input, weight, stride, padding, dilation, groups, output_mask, out_shape=None):
    return conv_backward_flop(
        grad_output, input, weight, None, stride, padding, dilation, False, (0, 0), groups, output_mask,
        out_val=out_shape,
    )  # fmt: skip
