"""Fake kernels of the matrix products: torch's shapes (and its errors), all results contiguous."""

import torch


@torch.library.register_fake("fastnn::linear")
def _linear(input, weight, bias=None):
    return input.new_empty(torch.nn.functional.linear(input, weight, bias).shape)


@torch.library.register_fake("fastnn::linear_backward")
def _linear_backward(grad_output, input, weight, mask):
    return (
        grad_output.new_empty(input.shape) if mask[0] else None,
        weight.new_empty(weight.shape) if mask[1] else None,
        weight.new_empty(weight.shape[0]) if mask[2] else None,
    )


@torch.library.register_fake("fastnn::mm")
@torch.library.register_fake("fastnn::bmm")
@torch.library.register_fake("fastnn::matmul")
def _product(input, other):
    return input.new_empty(torch.matmul(input, other).shape)


@torch.library.register_fake("fastnn::addmm")
def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    return mat1.new_empty(torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha).shape)
