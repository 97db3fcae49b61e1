"""ReLU, ReLU6, LeakyReLU, Sigmoid, Tanh, GELU and SiLU: any shape in, the same shape and strides out."""

import torch

from fastnn import functional as F
from fastnn.modules._trace import Proxy, one_node


class ReLU(torch.nn.ReLU):
    """torch.nn.ReLU on fastnn's kernels, in place where asked."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.relu(input, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """torch.nn.ReLU6 on fastnn's kernels, in place where asked."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.relu6(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """torch.nn.LeakyReLU on fastnn's kernels."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """torch.nn.Sigmoid on fastnn's kernels."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        try:
            return F.sigmoid(input)
        except AttributeError:  # of what is no tensor: the layer's error is another than the function's
            return torch.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """torch.nn.Tanh on fastnn's kernels."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        try:
            return F.tanh(input)
        except AttributeError:  # of what is no tensor: the layer's error is another than the function's
            return torch.tanh(input)


class GELU(torch.nn.GELU):
    """torch.nn.GELU on fastnn's kernels, both approximations."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """torch.nn.SiLU on fastnn's kernels."""

    def forward(self, input):
        if type(input) is Proxy and (node := one_node(self, input)) is not None:
            return node
        return F.silu(input, self.inplace)
