"""torch.nn.functional's signatures on fastnn's kernels."""

from fastnn.functional.conv2d import conv2d
from fastnn.functional.softmax import log_softmax, softmax

__all__ = ["conv2d", "log_softmax", "softmax"]
