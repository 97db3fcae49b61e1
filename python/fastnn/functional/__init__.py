"""torch.nn.functional's signatures on fastnn's kernels."""

from fastnn.functional.softmax import log_softmax, softmax

__all__ = ["log_softmax", "softmax"]
