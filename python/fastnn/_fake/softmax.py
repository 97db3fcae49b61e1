"""Fake kernels of fastnn::softmax and fastnn::log_softmax."""

import torch

from fastnn._fake._common import empty_dense


@torch.library.register_fake("fastnn::softmax")
@torch.library.register_fake("fastnn::log_softmax")
def _forward(input, dim):
    return empty_dense(input)


@torch.library.register_fake("fastnn::softmax_backward")
@torch.library.register_fake("fastnn::log_softmax_backward")
def _backward(grad_output, result, dim):
    return empty_dense(result)
