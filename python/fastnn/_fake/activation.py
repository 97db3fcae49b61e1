"""Fake kernels of the pointwise activations: the input's shape and strides."""

import torch


def _forward(input, *args):
    return torch.empty_like(input)


def _backward(grad_output, saved, *args):
    return torch.empty_like(saved)


for _name in ("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu"):
    torch.library.register_fake(f"fastnn::{_name}", _forward)
    torch.library.register_fake(f"fastnn::{_name}_backward", _backward)


@torch.library.register_fake("fastnn::relu_")
def _relu_(self):
    return self
