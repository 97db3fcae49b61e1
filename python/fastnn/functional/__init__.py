"""torch.nn.functional's signatures on fastnn's kernels."""

from fastnn.functional.conv2d import conv2d
from fastnn.functional.loss import cross_entropy, nll_loss
from fastnn.functional.softmax import log_softmax, softmax

__all__ = ["conv2d", "cross_entropy", "log_softmax", "nll_loss", "softmax"]
