"""MaxPool2d, AvgPool2d, AdaptiveAvgPool2d and AdaptiveMaxPool2d."""

import torch

from fastnn import functional as F
from fastnn.modules._trace import Proxy, one_node


class MaxPool2d(torch.nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastnn's kernels: (N, C, H, W) or (C, H, W) in, pooled planes out."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """torch.nn.AvgPool2d on fastnn's kernels: (N, C, H, W) or (C, H, W) in, pooled planes out."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d on fastnn's kernels: any plane in, output_size out."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """torch.nn.AdaptiveMaxPool2d on fastnn's kernels: any plane in, output_size out."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)
