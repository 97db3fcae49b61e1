"""fastnn's layers: each a subclass of its torch.nn namesake that differs in forward() alone."""

from fastnn.modules.conv2d import Conv2d
from fastnn.modules.loss import CrossEntropyLoss, NLLLoss
from fastnn.modules.softmax import LogSoftmax, Softmax

__all__ = ["Conv2d", "CrossEntropyLoss", "LogSoftmax", "NLLLoss", "Softmax"]
