"""fastnn's layers: each a subclass of its torch.nn namesake that differs in forward() alone."""

from fastnn.modules.softmax import LogSoftmax, Softmax

__all__ = ["LogSoftmax", "Softmax"]
