"""The layers of a frozen model: inference only, weights folded, the element-wise work that followed joined to them."""

import copy

import torch

from fastnn import _C
from fastnn import functional as F
from fastnn.functional.conv2d import _pad, _pair

_RANGES = {"": (-torch.inf, torch.inf), "relu": (0.0, torch.inf), "relu6": (0.0, 6.0)}


def contiguous(x):
    """A channels_last tensor in torch's default layout; anything else as it is."""
    return x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 4 else x


def _activate(x, activation):
    if activation == "relu":
        return F.relu(x, True)
    return torch.nn.functional.hardtanh_(x, 0.0, 6.0) if activation == "relu6" else x


class Frozen(torch.nn.Module):
    """What the layers here share: `fused`, the names of the layer types one call stands for."""

    def __init__(self, fused):
        super().__init__()
        self.fused = list(fused)
        self.activation = ""

    def constant(self, name, value):
        """Keeps a tensor that no gradient reaches; it is saved and moved with the model."""
        self.register_buffer(name, None if value is None else value.detach().clone())

    def runs_on(self):
        """Whether the calls so far (all, when there were none) ran on fastnn's kernels."""
        return True

    def describe(self):
        """For report(): what one call stands for."""
        return "fused: " + " + ".join(self.fused) if len(self.fused) > 1 else ""

    def extra_repr(self):
        return " + ".join(self.fused)


class FrozenConv2d(Frozen):
    """Conv2d, and what was folded or joined: BatchNorm2d, the addition of a residual, ReLU or ReLU6.

    [N, C, H, W] (and a residual of the output's shape) in, [N, K, P, Q] out.
    """

    def __init__(self, conv):
        super().__init__(["Conv2d"])
        self.constant("weight", conv.weight)
        self.constant("bias", conv.bias)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.padding_mode, self.pads = conv.padding_mode, list(conv._reversed_padding_repeated_twice)
        self.kernel = None

    def __getstate__(self):
        return {**super().__getstate__(), "kernel": None}  # packed weights are this machine's: made again where needed

    def __deepcopy__(self, memo):
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return other

    def describe(self):
        """For report(): what one call stands for, and the algorithm of the last call."""
        how = self.kernel.algorithm() if self.kernel else ""
        return super().describe() + (f" ({how})" if how else "")

    def _packed(self, input, residual):
        """The result by the packed kernels, or None where they do not take the call."""
        if self.kernel is None:
            _, padding = (None, (0, 0)) if self.padding_mode != "zeros" else (None, self.padding)
            if isinstance(padding, str):
                if padding == "same" and any(d * (k - 1) % 2 for d, k in zip(_pair(self.dilation), self.weight.shape[2:], strict=True)):
                    return None
                padding = _pad(None, self.weight, self.stride, padding, self.dilation)[1]
            self.kernel = _C.PackedConv2d(_pair(self.stride), _pair(padding), _pair(self.dilation), self.groups)
        low, high = _RANGES[self.activation]
        return self.kernel(input, self.weight, self.bias, residual, low, high)

    def forward(self, input, residual=None):
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = torch.nn.functional.pad(input, self.pads, mode=self.padding_mode), 0
        if type(input) is torch.Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            y = self._packed(input, residual)
            if y is not None:
                return y
        y = F.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        if residual is not None:
            y = y + residual
        return _activate(y, self.activation)


class FrozenLinear(Frozen):
    """Linear, a folded BatchNorm1d, ReLU or ReLU6: (..., in_features) in, (..., out_features) out."""

    def __init__(self, linear):
        super().__init__(["Linear"])
        self.constant("weight", linear.weight)
        self.constant("bias", linear.bias)

    def forward(self, input, residual=None):
        y = F.linear(input, self.weight, self.bias)
        if residual is not None:
            y = y + residual
        return _activate(y, self.activation)


class FrozenBatchNorm2d(Frozen):
    """BatchNorm2d in evaluation where no convolution precedes it, and a ReLU behind it: one pass."""

    def __init__(self, norm):
        super().__init__([type(norm).__name__])
        for name in ("running_mean", "running_var", "weight", "bias"):
            self.constant(name, getattr(norm, name))
        self.eps = norm.eps

    def forward(self, input):
        function = F.batch_norm_relu if self.activation == "relu" else F.batch_norm
        return function(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def fold(layer, norm):
    """Makes a frozen convolution or linear layer compute norm(layer(x)): in float64, rounded once."""
    weight, dtype = layer.weight.double(), layer.weight.dtype
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    bias = shift * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    layer.constant("weight", (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(dtype))
    layer.constant("bias", bias.to(dtype))
    layer.fused.append(type(norm).__name__)
