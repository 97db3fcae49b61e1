"""torch.nn.functional's signatures on fastnn's kernels."""

from fastnn.functional.activation import gelu, leaky_relu, relu, relu6, sigmoid, silu, tanh
from fastnn.functional.batch_norm import batch_norm, batch_norm_add_relu, batch_norm_relu
from fastnn.functional.conv2d import conv2d
from fastnn.functional.gemm import addmm, bmm, matmul, mm
from fastnn.functional.linear import linear
from fastnn.functional.loss import cross_entropy, nll_loss
from fastnn.functional.pool2d import adaptive_avg_pool2d, adaptive_max_pool2d, avg_pool2d, max_pool2d
from fastnn.functional.softmax import log_softmax, softmax

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "addmm",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_add_relu",
    "batch_norm_relu",
    "bmm",
    "conv2d",
    "cross_entropy",
    "gelu",
    "leaky_relu",
    "linear",
    "log_softmax",
    "matmul",
    "max_pool2d",
    "mm",
    "nll_loss",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]
