"""Cases of the matrix products and of conv2d."""

from case_types import N, case

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
            (1, 320, 10),
            (64, 320, 10),
            (1, 33, 100),
            (5, 17, 37),
            (13, 31, 16),
            (16, 64, 33),
            (29, 100, 65),
            (64, 784, 128),
            (65, 40, 33),
            (100, 300, 200),
            (256, 400, 120),
            (130, 600, 70),
            (8, 1100, 30),
            (70, 9, 9000),
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
