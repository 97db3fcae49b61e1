"""Softmax and LogSoftmax."""

import torch

from fastnn import functional as F
from fastnn.modules._trace import Proxy, one_node


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax on fastnn's kernels: any shape in, the same shape out."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax on fastnn's kernels: any shape in, the same shape out."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.log_softmax(input, self.dim, _stacklevel=5)
