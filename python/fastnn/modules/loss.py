"""CrossEntropyLoss and NLLLoss."""

import torch

from fastnn import functional as F
from fastnn.modules._tensors import buffer
from fastnn.modules._trace import Proxy, one_node


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on fastnn's kernels: logits (N, C, ...) and targets in, the loss out."""

    def forward(self, input, target):
        if type(input) is Proxy and (node := one_node(self, input, target)) is not None:
            return node
        return F.cross_entropy(
            input,
            target,
            weight=buffer(self, "weight"),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(torch.nn.NLLLoss):
    """torch.nn.NLLLoss on fastnn's kernels: log-probabilities (N, C, ...) and targets in, the loss out."""

    def forward(self, input, target):
        if type(input) is Proxy and (node := one_node(self, input, target)) is not None:
            return node
        weight = buffer(self, "weight")
        return F.nll_loss(input, target, weight=weight, ignore_index=self.ignore_index, reduction=self.reduction)
