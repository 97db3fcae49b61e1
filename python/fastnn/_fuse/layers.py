"""The layers of a frozen model: inference only, weights folded, the element-wise work that followed joined to them."""

import copy
import functools

import torch
import torch.fx

from fastnn import _C
from fastnn import functional as F
from fastnn.functional.conv2d import _pad, _pair
from fastnn.modules._script import refuse_script
from fastnn.modules._tensors import buffer
from fastnn.modules._trace import Proxy, recorded

_RANGES = {"relu": (0.0, torch.inf), "relu6": (0.0, 6.0)}  # what the packed kernels clamp to
_EVERYTHING = (-torch.inf, torch.inf)
_ONE_KERNEL = {"": _EVERYTHING, **_RANGES}  # what the CUDA product ends with; other activations are a second kernel


def _recorded(function):
    """A function that torch.fx records and does not look into: unpickling traces a frozen model again."""

    @functools.wraps(function)
    def call(first, *rest):
        one = first[0] if isinstance(first, (list, tuple)) else first
        if issubclass(type(one), torch.fx.Proxy):
            return one.tracer.create_proxy("call_function", call, (first, *rest), {})
        return function(first, *rest)

    return call


@_recorded
def contiguous(x):
    """A channels_last tensor in torch's default layout; anything else as it is."""
    return x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 4 else x


def with_fields(made, fields):
    """A dataclass, frozen or not, with the fields that its __init__() does not take."""
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _runs_packed(x):
    """Whether x is a plain tensor and nobody traces, counts or transforms what happens to it: the packed kernels are no
    operators of torch's."""
    if type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None


@_recorded
def concatenate(tensors, more):
    """torch.cat(tensors, 1) in channels_last, with room for `more` channels behind the last."""
    first = tensors[0]
    if (
        not _runs_packed(first)
        or first.dim() != 4
        or first.device.type != "cpu"
        or any(
            t.dtype != first.dtype or t.shape[0] != first.shape[0] or t.shape[2:] != first.shape[2:] for t in tensors
        )
    ):
        return torch.cat(tensors, 1)
    n, _, h, w = first.shape
    channels = sum(t.shape[1] for t in tensors)
    room = torch.empty((n, channels + more, h, w), dtype=first.dtype, memory_format=torch.channels_last)
    return _append(room, 0, tensors, channels)


@_recorded
def append(before, tensors, more):
    """torch.cat([before, *tensors], 1), where `before` comes from here or concatenate(): into the room behind it."""
    n, c, h, w = before.shape if before.dim() == 4 else (0, 0, 0, 0)
    channels = c + sum(t.shape[1] for t in tensors) if n else 0
    room = before.stride(3) if n else 0
    grows = _runs_packed(before) and n and w > 1 and h > 1 and room >= channels
    if (
        not grows
        or before.stride() != (h * w * room, 1, w * room, room)
        or any(t.dtype != before.dtype or t.shape[0] != n or t.shape[2:] != before.shape[2:] for t in tensors)
    ):
        return concatenate([before, *tensors], more)
    whole = before.as_strided((n, room, h, w), before.stride())
    return _append(whole, c, tensors, channels)


def _append(room, at, tensors, channels):
    for t in tensors:
        room.narrow(1, at, t.shape[1]).copy_(t)
        at += t.shape[1]
    return room.narrow(1, 0, channels)


def _activate(x, activation):
    """The activation of a tensor of our own, in place."""
    if not activation:
        return x
    if activation == "relu6":
        return torch.nn.functional.hardtanh_(x, 0.0, 6.0)
    if activation == "hardswish":
        return torch.nn.functional.hardswish(x, inplace=True)
    return F.relu(x, True) if activation == "relu" else F.silu(x, True)


class Frozen(torch.nn.Module):
    """What the layers here share: `fused`, the names of the layer types one call stands for."""

    def __init__(self, fused):
        super().__init__()
        self.fused = list(fused)
        self.activation = ""

    __prepare_scriptable__ = refuse_script

    def constant(self, name, value):
        """Keeps a tensor that no gradient reaches; it is saved and moved with the model."""
        with torch.inference_mode(False):  # an inference tensor would not tell that it was changed
            self.register_buffer(name, None if value is None else value.detach().clone())

    def describe(self):
        """For report(): what one call stands for."""
        return "fused: " + " + ".join(self.fused) if len(self.fused) > 1 else ""

    def extra_repr(self):
        return " + ".join(self.fused)


class FrozenConv2d(Frozen):
    """Conv2d, and what was folded or joined: BatchNorm2d, the addition of a residual, an activation.

    [N, C, H, W] (and a residual of the output's shape) in, [N, K, P, Q] out.
    """

    def __init__(self, conv):
        super().__init__(["Conv2d"])
        self.constant("weight", conv.weight)
        self.constant("bias", conv.bias)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.padding_mode, self.pads = conv.padding_mode, list(conv._reversed_padding_repeated_twice)
        self.kernel = None
        self.norm = None
        self.constant("scale", None)
        self.constant("shift", None)

    def put_behind(self, norm):
        """Takes a FrozenBatchNorm and its ReLU in front of a 1x1 convolution: they run on the way into the cache."""
        self.norm, self.fused = norm, norm.fused + self.fused
        scale, shift = norm.affine()
        self.constant("scale", scale.to(self.weight.dtype))
        self.constant("shift", shift.to(self.weight.dtype))

    def __getstate__(self):
        return {**self.__dict__, "kernel": None}  # packed weights are this machine's: made again where needed

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
            padding = self.padding if self.padding_mode == "zeros" else 0
            if isinstance(padding, str):
                sizes = zip(_pair(self.dilation), self.weight.shape[2:], strict=True)
                if padding == "same" and any(d * (k - 1) % 2 for d, k in sizes):
                    return None  # more padding on one side
                padding = _pad(None, self.weight, self.stride, padding, self.dilation)[1]
            self.kernel = _C.PackedConv2d(_pair(self.stride), _pair(padding), _pair(self.dilation), self.groups)
        low, high = _RANGES.get(self.activation, _EVERYTHING)
        weight, bias = buffer(self, "weight"), buffer(self, "bias")
        scale, shift = buffer(self, "scale"), buffer(self, "shift")
        y = self.kernel(input, weight, bias, residual, low, high, scale, shift)
        return y if y is None or self.activation in _RANGES else _activate(y, self.activation)

    def forward(self, input, residual=None):
        if type(input) is Proxy:
            return recorded(self, input, residual)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = torch.nn.functional.pad(input, self.pads, mode=self.padding_mode), 0
        if _runs_packed(input):
            y = self._packed(input, residual)
            if y is not None:
                return y
        if self.norm is not None:
            input = self.norm(input)
        weight, bias = buffer(self, "weight"), buffer(self, "bias")
        y = F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        if residual is not None:
            y = y + residual
        return _activate(y, self.activation)


class FrozenLinear(Frozen):
    """Linear, a folded BatchNorm1d, an activation: (..., in_features) in, (..., out_features) out."""

    def __init__(self, linear):
        super().__init__(["Linear"])
        self.constant("weight", linear.weight)
        self.constant("bias", linear.bias)
        self.norm = None  # what was folded, and the weights before: for (N, L, features), whose norm is over L
        self.constant("plain_weight", None)
        self.constant("plain_bias", None)

    def forward(self, input, residual=None):
        if type(input) is Proxy:
            return recorded(self, input, residual)
        if self.norm is None or input.dim() == 2:
            weight, bias = buffer(self, "weight"), buffer(self, "bias")
            if input.is_cuda and _runs_packed(input) and self.activation in _ONE_KERNEL:
                y = _C.linear_epilogue(input, weight, bias, residual, *_ONE_KERNEL[self.activation])
                if y is not None:
                    return y
            y = F.linear(input, weight, bias)
        else:
            y = self.norm(F.linear(input, self.plain_weight, self.plain_bias))
        if residual is not None:
            y = y + residual
        return _activate(y, self.activation)


class FrozenBatchNorm(Frozen):
    """A batch norm in evaluation with nothing before it that it could be folded into, and a ReLU after it: one pass."""

    def __init__(self, name, running_mean, running_var, weight, bias, eps):
        super().__init__([name])
        self.constant("running_mean", running_mean)
        self.constant("running_var", running_var)
        self.constant("weight", weight)
        self.constant("bias", bias)
        self.eps = eps

    def affine(self):
        """Its scale and shift per channel, in float64."""
        scale = (self.running_var.double() + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight.double()
        shift = -self.running_mean.double() * scale
        return scale, shift if self.bias is None else shift + self.bias.double()

    def forward(self, input):
        if type(input) is Proxy:
            return recorded(self, input)
        function = F.batch_norm_relu if self.activation == "relu" else F.batch_norm
        tensors = [buffer(self, name) for name in ("running_mean", "running_var", "weight", "bias")]
        return function(input, *tensors, False, 0.0, self.eps)


def fold(layer, norm):
    """Makes a frozen convolution or linear layer compute norm(layer(x)): in float64, rounded once."""
    if isinstance(layer, FrozenLinear):
        layer.norm = norm
        layer.constant("plain_weight", layer.weight)
        layer.constant("plain_bias", layer.bias)
    dtype, (scale, shift) = layer.weight.dtype, norm.affine()
    layer.constant("weight", (layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))).to(dtype))
    layer.constant("bias", (shift if layer.bias is None else shift + layer.bias.double() * scale).to(dtype))
    layer.fused += norm.fused
