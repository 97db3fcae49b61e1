"""Conv2d."""

import torch

from fastnn import functional as F
from fastnn.modules._tensors import parameter
from fastnn.modules._trace import Proxy, one_node


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d on fastnn's kernels: [N, C, H, W] or [C, H, W] in, [N, K, P, Q] or [K, P, Q] out."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return self._conv_forward(input, parameter(self, "weight"), parameter(self, "bias"))

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        try:
            return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        except TypeError:  # torch's, which names the arguments it was given: the layer gives all of them
            return torch.nn.functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
