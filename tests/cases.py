"""The list of cases every test and benchmark draws from, one section per family.

A case names a functional (fastnn.functional.<op>, and its torch twin) and its arguments; T(...) stands for a random
tensor. Tests run each case in several dtypes, layouts and instruction sets, so a new case is one line here.
"""

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


# ---- softmax -------------------------------------------------------------------------------------------------------

SOFTMAX = [
    case(op, *args, **kwargs)
    for op in ("softmax", "log_softmax")
    for args, kwargs in [
        ((N(3, 10),), {"dim": 1}),
        ((N(5, 7, 3),), {"dim": 0}),
        ((N(5, 7, 3),), {"dim": 1}),
        ((N(5, 7, 3), -1), {}),
        ((N(2, 3, 4, 5),), {"dim": 1}),
        ((N(2, 3, 4, 5),), {"dim": -1}),
        ((N(),), {"dim": 0}),
        ((N(0, 4),), {"dim": 1}),
        ((N(4, 0),), {"dim": 1}),
        ((N(1),), {"dim": 0}),
        ((N(2, 17, 18),), {"dim": 1}),
        ((N(3, 100),), {"dim": 1, "dtype": torch.float64}),
    ]
] + [case("log_softmax", N(2, n), 1, tags={"big"}) for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000)]

# ---- loss ----------------------------------------------------------------------------------------------------------


def classes(*shape, high):
    """T(shape): class indices below `high`."""
    return T(shape, kind="index", high=high)


def constant(*shape, kind="positive"):
    """T(shape) without a gradient: class weights."""
    return T(shape, kind=kind, grad=False)


def probabilities(*shape):
    return T(shape, kind="prob")


LOSS = (
    [
        # nll_loss gets values of one sign: a sum that cancels has no accuracy to compare. torch's own 4-D nll_loss
        # raises in backward for channels_last.
        case(
            op, N(*shape, kind=kind), classes(*shape[:1], *shape[2:], high=shape[1]), **kwargs,
            tags={*tags, *({"contiguous"} if op == "nll_loss" or len(shape) == 5 else ())},
        )  # fmt: skip
        for op, kind in (("cross_entropy", "normal"), ("nll_loss", "positive"))
        for shape, tags in [((5, 7), ()), ((2, 3, 5), {"big"}), ((2, 5, 3, 6), ()), ((2, 3, 2, 2, 5), {"big"})]
        for kwargs in [
            {"reduction": "sum"},
            {"weight": constant(shape[1]), "ignore_index": 1},
            {"weight": constant(shape[1]), "reduction": "none"},
        ]
    ]
    + [
        case("cross_entropy", N(*shape), classes(*shape[:1], *shape[2:], high=shape[1]), label_smoothing=0.1, **kwargs)
        for shape in ((5, 7), (2, 5, 3))
        for kwargs in [{"reduction": "none", "ignore_index": 2}, {"weight": constant(shape[1]), "ignore_index": 1}]
    ]
    + [
        case("cross_entropy", N(*shape), probabilities(*shape), **kwargs)
        for shape in ((5, 7), (2, 5, 3, 2))
        for kwargs in [{"label_smoothing": 0.2}, {"reduction": "none", "weight": constant(shape[1])}]
    ]
    + [
        case("cross_entropy", N(7), probabilities(7), reduction="sum", tags={"big"}),
        case("cross_entropy", N(4, 5), T((4, 5), kind="prob", grad=False)),
        case("cross_entropy", T((4, 5), grad=False), probabilities(4, 5), tags={"big"}),
        case("cross_entropy", N(4, 5), classes(4, high=5), label_smoothing=1.0, tags={"big"}),
        # All ignored: the mean is NaN, which opcheck calls a difference.
        case("cross_entropy", N(3, 4), classes(3, high=1), ignore_index=0, tags={"big"}),
        case("cross_entropy", N(3, 4), classes(3, high=1), ignore_index=0, reduction="sum"),
        case("cross_entropy", N(3, 4), classes(3, high=1), ignore_index=0, label_smoothing=0.1, tags={"big"}),
        case("nll_loss", N(3, 4), classes(3, high=1), ignore_index=0, tags={"big"}),
        *(case(op, N(5), classes(high=5), reduction="none") for op in ("cross_entropy", "nll_loss")),
        *(
            case(op, N(*shape), classes(*shape[:1], *shape[2:], high=shape[1]), reduction=r, tags={"big", "contiguous"})
            for op in ("cross_entropy", "nll_loss")
            for shape in ((0, 5), (0, 5, 2, 3), (2, 5, 0))
            for r in ("mean", "sum", "none")
        ),
        *(case("cross_entropy", N(0, 5), probabilities(0, 5), reduction=r, tags={"big"}) for r in ("mean", "none")),
        case("cross_entropy", N(3, 4), T((3, 4), kind="prob"), weight=N(4, kind="positive"), tags={"aten", "big"}),
    ]
    + [
        case("cross_entropy", N(m, n), classes(m, high=n), tags={"big"})
        for m, n in [(3, 1), (17, 2), (18, 15), (33, 16), (40, 17), (21, 31), (19, 33), (17, 64), (5, 65), (3, 1000)]
    ]
    + [
        case("cross_entropy", N(*shape), classes(*shape[:1], *shape[2:], high=shape[1]), label_smoothing=0.1, tags={"big"})
        for shape in [(19, 33), (2, 21, 20, 33)]
    ]
    + [
        case("cross_entropy", N(*shape), classes(*shape[:1], *shape[2:], high=shape[1]), tags={"big"})
        for shape in [(2, 3, 1, 100), (2, 130, 65)]
    ]
    + [case("cross_entropy", N(*shape), probabilities(*shape), tags={"big"}) for shape in [(21, 33), (2, 21, 5, 33)]]
)

# ---- activation ----------------------------------------------------------------------------------------------------

ACTIVATION = [
    case(op, *args, **kwargs)
    for op, kwargs in [
        ("relu", {}),
        ("leaky_relu", {}),
        ("leaky_relu", {"negative_slope": -0.3}),
        ("sigmoid", {}),
        ("tanh", {}),
        ("gelu", {}),
        ("gelu", {"approximate": "tanh"}),
        ("silu", {}),
    ]
    for args in [(N(3, 7),), (N(2, 3, 4, 5),), (N(),), (N(0, 4),)]
] + [case(op, N(n), tags={"big"}) for op in ("relu", "gelu", "tanh") for n in (15, 16, 17, 31, 32, 33, 70001)]

# ---- gemm ----------------------------------------------------------------------------------------------------------

GEMM = (
    [
        case("linear", *args)
        for args in [
            (N(3, 4), N(5, 4), N(5)),
            (N(3, 4), N(5, 4)),
            (N(4), N(5, 4), N(5)),
            (N(1, 8), N(1, 8), N(1)),
            (N(2, 3, 4), N(5, 4), N(5)),
            (N(2, 1, 3, 4), N(1, 4), N(1)),
            (N(7, 4), N(3, 4, grad=False), N(3)),
            (N(7, 4, grad=False), N(3, 4), N(3)),
            (N(7, 4), N(3, 4, grad=False)),
            (N(0, 4), N(5, 4), N(5)),
            (N(2, 0, 4), N(5, 4), N(5)),
            (N(3, 0), N(5, 0), N(5)),
            (N(3, 4), N(0, 4), N(0)),
            (N(1, 1), N(17, 1), N(17)),
            (N(17, 18), N(9, 18), N(9)),
        ]
    ]
    + [
        case("linear", N(m, k), N(n, k), N(n), tags={"big"})
        for m, k, n in [
            (1, 320, 10), (64, 320, 10), (1, 33, 100), (5, 17, 37), (13, 31, 16), (16, 64, 33), (29, 100, 65),
            (64, 784, 128), (65, 40, 33), (100, 300, 200), (256, 400, 120), (130, 600, 70), (8, 1100, 30), (70, 9, 9000),
        ]
    ]
    + [case("linear", N(3, 4), N(4), tags={"aten", "big"})]
    + [
        case(op, *args, tags={"contiguous"})
        for op, args in [
            ("mm", (N(3, 4), N(4, 5))),
            ("mm", (N(1, 4), N(4, 1))),
            ("mm", (N(3, 0), N(0, 5))),
            ("mm", (N(0, 4), N(4, 5))),
            ("mm", (N(17, 5), N(5, 18))),
            ("bmm", (N(2, 3, 4), N(2, 4, 5))),
            ("bmm", (N(0, 3, 4), N(0, 4, 5))),
            ("bmm", (N(3, 1, 4), N(3, 4, 1))),
            ("matmul", (N(4), N(4))),
            ("matmul", (N(4), N(4, 5))),
            ("matmul", (N(3, 4), N(4))),
            ("matmul", (N(3, 4), N(4, 5))),
            ("matmul", (N(2, 3, 4), N(4))),
            ("matmul", (N(4), N(2, 4, 5))),
            ("matmul", (N(2, 3, 4), N(4, 5))),
            ("matmul", (N(3, 4), N(2, 4, 5))),
            ("matmul", (N(2, 3, 4), N(2, 4, 5))),
            ("matmul", (N(2, 1, 3, 4), N(3, 4, 2))),
            ("matmul", (N(1, 3, 4), N(2, 4, 2))),
            ("matmul", (N(2, 2, 3, 4), N(2, 2, 4, 3))),
            ("matmul", (N(0, 3, 4), N(4, 2))),
            ("matmul", (N(2, 3, 0), N(2, 0, 3))),
        ]
    ]
    + [
        case(op, *args, tags={"big", "contiguous"})
        for op, args in [
            ("mm", (N(70, 300), N(300, 90))),
            ("mm", (N(600, 30), N(30, 500))),
            ("mm", (N(20, 9000), N(9000, 30))),
            ("mm", (N(2, 700), N(700, 300))),
            ("mm", (N(300, 700), N(700, 3))),
            ("bmm", (N(5, 40, 20), N(5, 20, 33))),
            ("matmul", (N(300, 200), N(200))),
            ("matmul", (N(300), N(300, 200))),
            ("matmul", (N(2, 70, 65, 66), N(66, 67))),
        ]
    ]
    + [
        case("addmm", *args, **kwargs)
        for args, kwargs in [
            ((N(5), N(3, 4), N(4, 5)), {}),
            ((N(3, 5), N(3, 4), N(4, 5)), {"beta": 0.5, "alpha": 2}),
            ((N(3, 1), N(3, 4), N(4, 5)), {"beta": -1.5}),
            ((N(1, 5), N(3, 4), N(4, 5)), {"alpha": -0.5}),
            ((N(), N(3, 4), N(4, 5)), {}),
            ((N(1), N(3, 4), N(4, 1)), {}),
            ((N(3, 5), N(3, 4), N(4, 5)), {"beta": 0}),
            ((N(5), N(3, 0), N(0, 5)), {}),
            ((N(5), N(0, 4), N(4, 5)), {}),
        ]
    ]
)

# ---- conv2d --------------------------------------------------------------------------------------------------------


def conv(*args, tags=(), **kwargs):
    return case("conv2d", *args, tags=tags, **kwargs)


CONV2D = [
    conv(N(2, 3, 8, 9), N(4, 3, 3, 3), N(4)),
    conv(N(2, 3, 8, 9), N(4, 3, 3, 3)),
    conv(N(2, 3, 7, 6), N(5, 3, 3, 2), N(5), stride=2, padding=1),
    conv(N(2, 2, 9, 8), N(3, 2, 3, 3), N(3), stride=(2, 3), padding=(2, 1), dilation=(2, 1)),
    conv(N(1, 2, 11, 10), N(2, 2, 3, 3), None, 3, 0, 2),
    conv(N(2, 4, 6, 6), N(6, 2, 3, 3), N(6), padding=1, groups=2),
    conv(N(2, 4, 6, 7), N(4, 1, 3, 3), N(4), padding=1, groups=4),
    conv(N(1, 3, 7, 7), N(6, 1, 3, 3), N(6), stride=2, padding=1, groups=3),
    conv(N(2, 5, 4, 3), N(7, 5, 1, 1), N(7)),
    conv(N(2, 3, 7, 7), N(4, 3, 1, 1), N(4), stride=2),
    conv(N(2, 3, 4, 4), N(4, 3, 1, 1), N(4), padding=1),
    conv(N(2, 3, 6, 5), N(2, 3, 3, 3), N(2), padding="same"),
    conv(N(2, 3, 6, 5), N(2, 3, 2, 4), N(2), padding="same"),
    conv(N(1, 2, 9, 8), N(2, 2, 3, 2), N(2), padding="same", dilation=(2, 3)),
    conv(N(2, 3, 6, 5), N(2, 3, 3, 3), N(2), padding="valid"),
    conv(N(3, 6, 7), N(4, 3, 3, 3), N(4), padding=1),
    conv(N(3, 6, 7), N(4, 3, 3, 3), None, [2], [1], [1]),
    conv(N(0, 3, 6, 6), N(4, 3, 3, 3), N(4)),
    conv(N(2, 1, 6, 6), N(3, 1, 5, 5), N(3)),
    conv(N(1, 1, 3, 3), N(1, 1, 3, 3), N(1)),
    conv(N(1, 2, 3, 3), N(2, 2, 3, 3), N(2), padding=4),
    conv(N(1, 2, 8, 3), N(2, 2, 3, 3), N(2), stride=2, padding=(0, 1)),
    conv(N(2, 2, 6, 5), N(3, 2, 2, 2), N(3), stride=3),
    conv(N(2, 3, 6, 6), N(4, 3, 3, 3, grad=False), N(4), padding=1),
    conv(N(2, 3, 6, 6, grad=False), N(4, 3, 3, 3), N(4), padding=1),
    conv(N(2, 3, 6, 6, grad=False), N(4, 3, 3, 3, grad=False), N(4), padding=1),
    # Networks' layers, and more channels, pixels and taps than any register tile or band.
    conv(N(3, 1, 28, 28), N(10, 1, 5, 5), N(10), tags={"big", "vendor"}),
    conv(N(3, 10, 12, 12), N(20, 10, 5, 5), N(20), tags={"big", "vendor"}),
    conv(N(2, 3, 32, 32), N(32, 3, 5, 5), N(32), padding=2, tags={"big", "vendor"}),
    conv(N(2, 32, 8, 8), N(64, 32, 5, 5), N(64), padding=2, tags={"big", "vendor"}),
    conv(N(2, 16, 32, 32), N(16, 16, 3, 3), None, padding=1, tags={"big", "vendor"}),
    conv(N(2, 16, 16, 16), N(32, 16, 3, 3), None, stride=2, padding=1, tags={"big", "vendor"}),
    conv(N(1, 3, 56, 56), N(37, 3, 7, 7), None, stride=2, padding=3, tags={"big", "vendor"}),
    conv(N(1, 3, 67, 67), N(33, 3, 11, 11), N(33), stride=4, padding=2, tags={"big", "vendor"}),
    conv(N(1, 70, 15, 14), N(67, 70, 3, 3), N(67), padding=1, tags={"big", "vendor"}),
    conv(N(2, 65, 13, 9), N(130, 65, 1, 1), N(130), tags={"big", "vendor"}),
    conv(N(1, 64, 14, 14), N(96, 64, 1, 1), None, stride=2, tags={"big", "vendor"}),
    conv(N(1, 5, 100, 100), N(10, 5, 3, 3), N(10), tags={"big", "vendor"}),
    conv(N(2, 48, 20, 20), N(48, 1, 3, 3), None, padding=1, groups=48, tags={"big", "vendor"}),
    conv(N(2, 48, 21, 21), N(48, 1, 3, 3), None, stride=2, padding=1, groups=48, tags={"big", "vendor"}),
    conv(N(1, 40, 9, 9), N(48, 20, 3, 3), N(48), padding=2, dilation=2, groups=2, tags={"big", "vendor"}),
]

# ---- pool2d --------------------------------------------------------------------------------------------------------

MAX_WINDOWS = [
    ((N(2, 3, 8, 8), 2), {}),
    ((N(2, 3, 9, 7), 2), {}),
    ((N(2, 2, 9, 11), 3, 2), {}),
    ((N(1, 2, 8, 10), 3), {"stride": 2, "padding": 1}),
    ((N(1, 3, 7, 9), 3, 1, 1), {}),
    ((N(2, 7, 8), (2, 3), (1, 2)), {}),
    ((N(1, 2, 7, 8), 3, 2), {"ceil_mode": True}),
    ((N(1, 2, 6, 7), (3, 2), 2, (1, 0)), {"ceil_mode": True}),
    ((N(1, 2, 9, 11), 3, 2, 1, 2), {}),
    ((N(1, 2, 9, 11), (2, 3), (1, 2), 1, (2, 1)), {}),
    ((N(1, 2, 12, 10), 3), {}),
    ((N(1, 1, 12, 9), (1, 4), (1, 5)), {}),
    ((N(0, 2, 6, 6), 2), {}),
    ((N(1, 1, 1, 1), 1), {}),
    ((N(1, 1, 17, 17), 16, 1), {}),
]

POOL2D = (
    [case("max_pool2d", *args, **kwargs) for args, kwargs in MAX_WINDOWS]
    + [case("max_pool2d", *args, **kwargs, return_indices=True) for args, kwargs in MAX_WINDOWS]
    + [
        case("avg_pool2d", *args, **kwargs)
        for args, kwargs in [
            ((N(2, 3, 8, 8), 2), {}),
            ((N(2, 3, 9, 7), 2), {}),
            ((N(1, 2, 9, 11), 3, 2), {}),
            ((N(1, 2, 8, 10), 3), {"stride": 2, "padding": 1}),
            ((N(1, 2, 8, 10), 3, 2, 1), {"count_include_pad": False}),
            ((N(1, 3, 7, 9), 3, 1, 1), {}),
            ((N(2, 7, 8), (2, 3), (1, 2)), {}),
            ((N(1, 2, 7, 8), 3, 2), {"ceil_mode": True}),
            ((N(1, 2, 6, 8), 3, 2, 1), {"ceil_mode": True}),
            ((N(1, 2, 6, 8), 3, 2, 1), {"ceil_mode": True, "count_include_pad": False}),
            ((N(1, 2, 6, 7), (3, 2), 2, (1, 0)), {"ceil_mode": True, "divisor_override": 5}),
            ((N(1, 2, 6, 6), 2), {"divisor_override": -3}),
            ((N(1, 2, 12, 10), 3), {}),
            ((N(1, 1, 12, 9), (1, 4), (1, 5)), {}),
            ((N(0, 2, 6, 6), 2), {}),
            ((N(1, 1, 1, 1), 1), {}),
            ((N(1, 2, 7, 7), 7), {}),
        ]
    ]
    + [
        case(op, *args, **kwargs)
        for op in ("adaptive_avg_pool2d", "adaptive_max_pool2d")
        for args in [
            (N(2, 3, 8, 6), 1),
            (N(2, 3, 8, 6), (4, 2)),
            (N(1, 2, 7, 9), (3, 4)),
            (N(2, 7, 5), (None, 3)),
            (N(1, 2, 5, 4), (7, 4)),
            (N(1, 2, 3, 3), 5),
            (N(0, 2, 6, 6), 4),
            (N(1, 1, 20, 33), (1, 2)),
        ]
        for kwargs in ([{}] if op == "adaptive_avg_pool2d" else [{}, {"return_indices": True}])
    ]
    # Rows shorter and longer than vectors, more planes than lanes; large windows; columns cut into tiles.
    + [
        case(op, N(2, 3, 6, width), kernel, stride, padding, tags={"big"})
        for op in ("max_pool2d", "avg_pool2d")
        for width in (15, 16, 17, 31, 32, 33, 64, 65, 130)
        for kernel, stride, padding in [(2, 2, 0), (3, 2, 1), (3, 1, 1)]
    ]
    + [
        case(op, *args, tags={"big"})
        for op in ("max_pool2d", "avg_pool2d")
        for args in [
            (N(33, 5, 4, 4), 2),
            (N(9, 7, 8, 8), 2),
            (N(17, 3, 5, 5), 3, 2),
            (N(1, 2, 5, 3000), 2),
            (N(1, 2, 5, 3000), 3, 1, 1),
            (N(1, 1, 4, 5000), (2, 2500), 1),
            (N(1, 2, 40, 41), 5, 1, 2),
            (N(1, 2, 40, 41), 4, 4, 2),
            (N(1, 3, 40, 42), (5, 6), (5, 6)),
        ]
    ]
)

# ---- batch_norm ----------------------------------------------------------------------------------------------------

BATCH_NORM = [
    case("batch_norm", N(*shape), *args, **kwargs)
    for shape in [(6, 3), (4, 3, 5), (3, 4, 3, 5), (2, 3, 2, 2, 2)]
    for C in [shape[1]]
    for stats in [(T((C,), grad=False), T((C,), "positive", grad=False))]
    for args, kwargs in [
        ((*stats, N(C), N(C)), {"training": True}),
        ((*stats, N(C), N(C)), {"training": False, "eps": 1e-3}),
        ((*stats,), {"training": True, "momentum": 0.5}),
        ((None, None, N(C), N(C)), {"training": True}),
        ((*stats, N(C), None), {}),
    ]
] + [
    case("batch_norm", N(*shape), T((shape[1],), grad=False), T((shape[1],), "positive", grad=False), N(shape[1]),
         N(shape[1]), training=training, tags={"big"})
    for shape in [(5, 17, 9, 9), (2, 70, 3, 3), (3, 2, 70, 65), (300, 33), (0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (4, 64)]
    for training in (True, False)
]

# ---- all -----------------------------------------------------------------------------------------------------------

ALL = SOFTMAX + LOSS + ACTIVATION + GEMM + CONV2D + POOL2D + BATCH_NORM

# Calls that torch refuses: (op, args builder). fastnn must raise the same type with the same text.
BAD = [
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2, 2, 2)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2, 0)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 0)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), -2)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2, 2, -1)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2, 2, 0, 0)),
    ("max_pool2d", lambda: (torch.randn(8, 8), 2)),
    ("max_pool2d", lambda: (torch.randn(1, 1, 1, 8, 8), 2)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), (2, 2, 2))),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), ())),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), "two")),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2.0)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 9)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8, requires_grad=True), 9)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8, requires_grad=True), 2, 2, 2)),
    ("max_pool2d", lambda: (torch.randn(1, 0, 8, 8), 2)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 0, 8), 2)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2**40)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2**80)),
    ("max_pool2d", lambda: ("text", 2)),
    ("max_pool2d", lambda: (torch.zeros(1, 2, 8, 8, dtype=torch.bool), 2)),
    ("max_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2, 2, 2, 1, False, True)),
    ("avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2, 2, 2)),
    ("avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2, 0)),
    ("avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), 0)),
    ("avg_pool2d", lambda: (torch.randn(8, 8), 2)),
    ("avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), (2, 2, 2))),
    ("avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), 2, 2, 0, False, True, 0)),
    ("avg_pool2d", lambda: (torch.zeros(1, 2, 8, 8, dtype=torch.int64), 9)),
    ("avg_pool2d", lambda: (torch.randn(1, 2, 8, 8, requires_grad=True), 9)),
    ("adaptive_avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), -1)),
    ("adaptive_avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), (1, 2, 3))),
    ("adaptive_avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), (1, 2, 3, 4))),
    ("adaptive_avg_pool2d", lambda: (torch.randn(8, 8), (2, 2))),
    ("adaptive_avg_pool2d", lambda: (torch.randn(8), (2, None))),
    ("adaptive_avg_pool2d", lambda: (torch.randn(1, 2, 8, 8), "ab")),
    ("adaptive_avg_pool2d", lambda: (torch.randn(1, 2, 0, 8), 2)),
    ("adaptive_max_pool2d", lambda: (torch.randn(1, 2, 8, 8), -1)),
    ("adaptive_max_pool2d", lambda: (torch.randn(1, 2, 8, 8, requires_grad=True), (-1, 2))),
    ("adaptive_max_pool2d", lambda: (torch.randn(1, 2, 8, 8), (1, 2, 3))),
    ("adaptive_max_pool2d", lambda: (torch.randn(8, 8), 2)),
    ("adaptive_max_pool2d", lambda: (torch.randn(1, 2, 0, 8), 2)),
    ("softmax", lambda: (torch.randn(3, 4), 2)),
    ("softmax", lambda: (torch.randn(3, 4), -3)),
    ("softmax", lambda: (torch.ones(3, 4, dtype=torch.int64), 1)),
    ("softmax", lambda: ("text", 1)),
    ("log_softmax", lambda: (torch.randn(3, 4), 2)),
    ("log_softmax", lambda: (torch.randn(3, 4), "one")),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 5, 3, 3))),
    ("conv2d", lambda: (torch.randn(3, 8), torch.randn(4, 3, 3, 3))),
    ("conv2d", lambda: (torch.randn(1, 2, 3, 8, 8), torch.randn(4, 3, 3, 3))),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3))),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(5))),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4, 1))),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 0)),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, -1)),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 1, -1)),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 1, 0, 0)),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 1, 0, 1, 2)),
    ("conv2d", lambda: (torch.randn(2, 4, 8, 8), torch.randn(3, 2, 3, 3), None, 1, 0, 1, 2)),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 1, 0, 1, 0)),
    ("conv2d", lambda: (torch.randn(2, 3, 2, 2), torch.randn(4, 3, 3, 3))),
    ("conv2d", lambda: (torch.randn(3, 2, 2), torch.randn(4, 3, 3, 3))),
    ("conv2d", lambda: (torch.randn(3, 8, 8), torch.randn(4, 5, 3, 3))),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3).double())),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4).double())),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, (1, 2, 3))),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 1.5)),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, ())),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 1, "full")),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 2, "same")),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3), None, 1, "same")),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 0, 3))),
    ("conv2d", lambda: (torch.randn(2, 0, 8, 8), torch.randn(4, 3, 3, 3))),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 1, 0, 2**62)),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), "weight")),
    ("conv2d", lambda: (None, torch.randn(4, 3, 3, 3))),
    ("conv2d", lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), "bias")),
    *(
        (op, lambda x=x, t=t: (x, t))
        for op in ("cross_entropy", "nll_loss")
        for x, t in [
            (torch.randn(3, 5), torch.tensor([0, 7, 9])),
            (torch.randn(3, 5), torch.tensor([0, -1, 9])),
            (torch.randn(3, 5), torch.tensor([0, 7, 9], dtype=torch.uint8)),
            (torch.randn(3, 0), torch.tensor([0, 0, 0])),
            (torch.randn(2, 5, 2, 2), torch.full((2, 2, 2), 5)),
            (torch.randn(2, 5, 2), torch.full((2, 2), -5)),
            (torch.randn(2, 5, 2, 2), torch.zeros(2, 2, 2, dtype=torch.uint8)),
            (torch.randn(2, 5, 2), torch.zeros(2, 2, dtype=torch.uint8)),
            (torch.randn(3, 5), torch.zeros(3, dtype=torch.int32)),
            (torch.randn(3, 5), torch.zeros(3)),
            (torch.randn(3, 5), torch.zeros(3, dtype=torch.bool)),
            (torch.randn(3, 5), torch.zeros(3, 5, dtype=torch.int64)),
            (torch.randn(3, 5), torch.zeros(4, dtype=torch.int64)),
            (torch.randn(3, 5), torch.zeros(3, 1, dtype=torch.int64)),
            (torch.randn(3, 5), torch.tensor(1)),
            (torch.randn(3, 5, 2), torch.zeros(3, 3, dtype=torch.int64)),
            (torch.randn(3, 5, 2, 2), torch.zeros(3, 2, 3, dtype=torch.int64)),
            (torch.randn(3, 5, 2, 2), torch.zeros(3, 2, dtype=torch.int64)),
            (torch.randn(3, 5, 2, 2, 2), torch.zeros(3, 2, 2, dtype=torch.int64)),
            (torch.randn(()), torch.tensor(0)),
            (torch.randn(5), torch.tensor([1, 2])),
            (torch.randn(5), torch.tensor(5)),
            (torch.randn(3, 5).int(), torch.zeros(3, dtype=torch.int64)),
            (torch.randn(3, 5), [0, 1, 2]),
            ([[0.0]], torch.zeros(1, dtype=torch.int64)),
            (torch.randn(3, 5), None),
            (torch.randn(3, 5, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")),
        ]
    ),
    *(
        (op, lambda kwargs=kwargs: (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64), *kwargs))
        for op in ("cross_entropy", "nll_loss")
        # weight, size_average, ignore_index, reduce, reduction, label_smoothing
        for kwargs in [
            (torch.ones(4),),
            (torch.ones(5, 1),),
            (torch.ones(5, dtype=torch.float64),),
            (torch.ones(5, requires_grad=True),),
            ("text",),
            (None, None, 1.5),
            (None, None, "text"),
            (None, None, -100, None, "avg"),
            (None, None, -100, None, None),
            (None, None, -100, None, 3),
        ]
    ),
    *(
        ("cross_entropy", lambda kwargs=kwargs: (torch.randn(3, 5), *kwargs))
        for kwargs in [
            (torch.zeros(3, dtype=torch.int64), None, None, -100, None, "mean", 1.5),
            (torch.zeros(3, dtype=torch.int64), None, None, -100, None, "mean", "text"),
            (torch.zeros(3, dtype=torch.int64), None, None, -100, None, "mean", None),
            (torch.zeros(3, 5), None, None, -100, None, "mean", 1.5),
            (torch.zeros(3, 5), None, None, 1),
            (torch.zeros(3, 5), torch.ones(4)),
            (torch.zeros(3, 5), torch.ones(1, 5)),
        ]
    ),
    ("linear", lambda: (torch.randn(3, 4), torch.randn(5, 3))),
    ("linear", lambda: (torch.randn(3, 4), torch.randn(5, 4), torch.randn(4))),
    ("linear", lambda: (torch.randn(()), torch.randn(5, 4))),
    ("linear", lambda: (torch.randn(3, 4), torch.randn(2, 5, 4))),
    ("linear", lambda: (torch.randn(3, 4), torch.randn(5, 4).double())),
    ("linear", lambda: (torch.ones(3, 4, dtype=torch.int64), torch.randn(5, 4))),
    ("linear", lambda: (torch.randn(3, 4), torch.randn(5, 4), torch.randn(5).double())),
    ("linear", lambda: (torch.randn(3, 4), "weight")),
    ("linear", lambda: (torch.randn(3, 4), None)),
    ("linear", lambda: (torch.randn(3, 4, device="meta"), torch.randn(5, 3, device="meta"))),
    ("mm", lambda: (torch.randn(3, 4), torch.randn(3, 4))),
    ("mm", lambda: (torch.randn(3), torch.randn(3, 4))),
    ("mm", lambda: (torch.randn(3, 4), torch.randn(4, 5).double())),
    ("mm", lambda: (torch.randn(3, 4), 2)),
    ("bmm", lambda: (torch.randn(2, 3, 4), torch.randn(3, 4, 5))),
    ("bmm", lambda: (torch.randn(2, 3, 4), torch.randn(4, 5))),
    ("matmul", lambda: (torch.randn(()), torch.randn(4))),
    ("matmul", lambda: (torch.randn(3, 4), torch.randn(3))),
    ("matmul", lambda: (torch.randn(2, 3, 4), torch.randn(3, 4, 5))),
    ("matmul", lambda: (torch.randn(3, 4), None)),
    ("addmm", lambda: (torch.randn(6), torch.randn(3, 4), torch.randn(4, 5))),
    ("addmm", lambda: (torch.randn(5), torch.randn(3, 4), torch.randn(3, 5))),
    ("addmm", lambda: (torch.randn(1, 3, 5), torch.randn(3, 4), torch.randn(4, 5))),
    ("addmm", lambda: (torch.randn(5), torch.randn(3, 4), "text")),
    ("batch_norm", lambda: (torch.randn(1, 3), None, None, None, None, True)),
    ("batch_norm", lambda: (torch.randn(1, 3, 1, 1), torch.zeros(3), torch.ones(3), None, None, True)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), None, None)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), torch.zeros(3), None, None, None, True)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), torch.zeros(3), None)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), torch.zeros(2), torch.ones(2))),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), torch.zeros(3, 1), torch.ones(3))),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), None, None, torch.ones(2), None, True)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), None, None, torch.ones(3), torch.ones(4), True)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), torch.zeros(3).double(), torch.ones(3).double())),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), None, None, torch.ones(3).double(), None, True)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), None, None, None, None, True, 0.1, 0.0)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3), None, None, False, 0.1, -1.0)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3), None, None, True, None)),
    ("batch_norm", lambda: (torch.randn(4, 3, 5), torch.zeros(3).requires_grad_(), torch.ones(3))),
    ("batch_norm", lambda: (torch.ones(4, 3, 5, dtype=torch.int32), None, None, None, None, True)),
    ("batch_norm", lambda: (torch.randn(3), torch.zeros(3), torch.ones(3))),
    ("batch_norm", lambda: (torch.randn(()), None, None, None, None, True)),
    ("batch_norm", lambda: ("text", torch.zeros(3), torch.ones(3))),
    ("relu", lambda: (torch.ones(3, requires_grad=True), True)),
    ("relu", lambda: (torch.ones(3, 1, requires_grad=True)[0], True)),
    ("relu", lambda: (torch.ones(1, 3).expand(2, 3), True)),
    ("relu", lambda: (torch.ones(3, dtype=torch.bool),)),
    ("relu", lambda: ("text",)),
    ("leaky_relu", lambda: (torch.ones(3), "slope")),
    ("sigmoid", lambda: (None,)),
    ("silu", lambda: (torch.ones(3, dtype=torch.int64),)),
]
