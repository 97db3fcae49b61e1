"""What a case is made of; the cases themselves are in cases.py."""

import zlib
from dataclasses import dataclass, field

import torch

import fastnn


@dataclass(frozen=True)
class T:
    """A random tensor argument.

    kind: "normal"; "positive" (uniform in [0.5, 1.5)); "prob" (rows of dim 1 sum to 1); "index" (int64 in [0, high)).
    """

    shape: tuple
    kind: str = "normal"
    high: int = 0
    grad: bool = True  # floating tensors only

    def make(self, generator, dtype, device):
        if self.kind == "index":
            return torch.randint(0, self.high, self.shape, generator=generator).to(device)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "positive":
            x = torch.rand(self.shape, generator=generator, dtype=torch.float64) + 0.5
        elif self.kind == "prob":
            x = torch.softmax(x, 1 if len(self.shape) > 1 else 0)
        return x.to(dtype).to(device)


def N(*shape, **options):
    """T(shape): a tensor of standard normal values that takes part in gradients."""
    return T(shape, **options)


@dataclass(frozen=True)
class Case:
    op: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    tags: frozenset = frozenset()

    @property
    def name(self):
        def text(v):
            if isinstance(v, T):
                return "x".join(map(str, v.shape)) or "scalar"
            return str(v).replace(" ", "")

        parts = [text(a) for a in self.args] + [f"{k}={text(v)}" for k, v in self.kwargs.items()]
        return f"{self.op}[{','.join(parts)}]"

    @property
    def fast(self):
        return getattr(fastnn.functional, self.op)

    @property
    def reference(self):
        return getattr(torch.nn.functional, self.op, None) or getattr(torch, self.op)

    def build(self, dtype, device="cpu", layout="contiguous"):
        """Fresh (args, kwargs) with every T replaced, the same values on every call.

        layout: "contiguous"; "channels_last" (4-D tensors only); "strided" (every tensor a slice of a larger one).
        """
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def build_one(value):
            if not isinstance(value, T):
                return value
            t = value.make(generator, dtype, device)
            if layout == "channels_last" and t.dim() == 4:
                t = t.contiguous(memory_format=torch.channels_last)
            elif layout == "strided" and t.dim() > 0:
                wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype, device=device)
                wide[..., 1::2] = t
                t = wide[..., 1::2]
            if t.is_floating_point():
                t.requires_grad_(value.grad)
            return t

        return tuple(map(build_one, self.args)), {k: build_one(v) for k, v in self.kwargs.items()}

    @property
    def has_4d(self):
        tensors = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, T)]
        return "contiguous" not in self.tags and any(len(t.shape) == 4 for t in tensors)


def case(op, *args, tags=(), **kwargs):
    """tags: "nodiff2" (no second derivative to check), "big" (too large for gradcheck and opcheck),
    "aten" (documented to run on torch's kernels), "vendor" (torch's kernels win on some dtypes, layouts or passes),
    "contiguous" (nothing in torch to compare channels_last with)."""
    return Case(op, args, kwargs, frozenset(tags))


def tensors(args, kwargs):
    return [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]


def differentiable(args, kwargs):
    return [t for t in tensors(args, kwargs) if t.requires_grad]
