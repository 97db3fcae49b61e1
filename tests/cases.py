"""The list of cases every test and benchmark draws from, one section per family.

A case names a functional (fastnn.functional.<op>, and its torch twin) and its arguments; T(...) stands for a random
tensor. Tests run each case in several dtypes, layouts and instruction sets, so a new case is one line here.
Matrix products and convolutions are in cases_products.py, calls that torch refuses in cases_bad.py.
"""

import torch
from case_types import Case, N, T, case, differentiable, tensors
from cases_bad import BAD
from cases_products import CONV2D, GEMM

__all__ = ["ALL", "BAD", "CONV2D", "GEMM", "Case", "N", "T", "case", "differentiable", "tensors"]

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
        *(((N(2, 19, n),), {"dim": 1}) for n in (2, 4, 5, 6, 8, 12, 15, 16)),  # rows that take turns
        *(((N(1, k, n),), {"dim": 1}) for k, n in [(33, 17), (17, 9), (11, 20), (7, 3)]),  # classes side by side
        ((N(3, 100),), {"dim": 1, "dtype": torch.float64}),
    ]
] + [case("log_softmax", N(2, n), 1, tags={"big"}) for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000)]
SOFTMAX += [case(op, N(2, 140, n), 1, tags={"big"}) for op in ("softmax", "log_softmax") for n in (17, 31, 42, 62, 63)]

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
            op,
            N(*shape, kind=kind),
            classes(*shape[:1], *shape[2:], high=shape[1]),
            **kwargs,
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
        case(
            "cross_entropy",
            N(*shape),
            classes(*shape[:1], *shape[2:], high=shape[1]),
            label_smoothing=0.1,
            tags={"big"},
        )
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
        ("relu6", {}),
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
    case(
        "batch_norm",
        N(*shape),
        T((shape[1],), grad=False),
        T((shape[1],), "positive", grad=False),
        N(shape[1]),
        N(shape[1]),
        training=training,
        tags={"big"},
    )
    for shape in [
        (5, 17, 9, 9),
        (2, 70, 3, 3),
        (3, 2, 70, 65),
        (2, 3, 91, 91),  # a block of 8192 and a short rest
        (300, 33),
        (300, 7),  # rows taken together
        (0, 3),
        (0, 3, 4, 4),
        (2, 3, 0, 4),
        (4, 64),
    ]
    for training in (True, False)
]

# ---- all -----------------------------------------------------------------------------------------------------------

ALL = SOFTMAX + LOSS + ACTIVATION + GEMM + CONV2D + POOL2D + BATCH_NORM
