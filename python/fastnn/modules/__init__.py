"""fastnn's layers: each a subclass of its torch.nn namesake that differs in forward() alone."""

from fastnn.modules._script import refuse_script
from fastnn.modules.activation import GELU, LeakyReLU, ReLU, ReLU6, Sigmoid, SiLU, Tanh
from fastnn.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNormAddReLU2d, BatchNormReLU2d
from fastnn.modules.conv2d import Conv2d
from fastnn.modules.linear import Linear
from fastnn.modules.loss import CrossEntropyLoss, NLLLoss
from fastnn.modules.pool2d import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, MaxPool2d
from fastnn.modules.softmax import LogSoftmax, Softmax

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNormAddReLU2d",
    "BatchNormReLU2d",
    "Conv2d",
    "CrossEntropyLoss",
    "GELU",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MaxPool2d",
    "NLLLoss",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
]

for _name in __all__:
    globals()[_name].__prepare_scriptable__ = refuse_script
del refuse_script
