"""Softmax and LogSoftmax."""

import torch

from fastnn import functional as F


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax on fastnn's kernels: any shape in, the same shape out."""

    def forward(self, input):
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax on fastnn's kernels: any shape in, the same shape out."""

    def forward(self, input):
        return F.log_softmax(input, self.dim, _stacklevel=5)
