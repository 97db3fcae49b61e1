"""What the list of cases cannot say about pooling: ties, NaN, infinities, memory for backward, modules, fallbacks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits_for_every_thread_count

import fastnn

SHAPES = [((3, 5, 8, 8), (2,)), ((2, 3, 24, 24), (2,)), ((2, 3, 13, 37), (3, 2)), ((2, 5, 14, 18), (3, 1, 1)),
          ((2, 3, 13, 35), (3, 2, 1)), ((1, 2, 40, 41), (5, 3, 2)), ((1, 17, 9, 10), (3, 3)), ((1, 3, 20, 33), (2, 1)),
          ((1, 18, 11, 11), (17, 1, 8)),
          # Narrow rows and pixels, several to a vector; 3x3 by 2 at every width of the last vector; strides without a
          # shuffle; more taps than a byte has values.
          ((3, 5, 6, 2), (2,)), ((3, 7, 4, 10), (2,)), ((2, 9, 14, 14), (2,)), ((1, 15, 7, 9), (2,)),
          ((1, 1, 2, 2), (2,)),
          ((2, 2, 9, 63), (3, 2)), ((1, 3, 8, 32), (3, 2, 1)), ((1, 2, 7, 33), (3, 2, 1, 1, True)),
          ((1, 2, 8, 70), (3, 2, 0, 1, True)), ((2, 3, 8, 5), (3, 2, 1)), ((2, 3, 5, 5), (5, 1, 2)),
          ((1, 2, 3, 50), (3, 1, 1)),
          ((1, 2, 30, 30), (5, 5)), ((2, 3, 23, 29), (7, 4, 3)), ((1, 2, 21, 50), (4, 6, 1, 2)),
          ((1, 3, 40, 20), (20, 20)), ((2, 2, 19, 19), (19, 5, 6)),
          # Windows that tile the plane, whole vectors written past the end of a row: remainders of every kind.
          ((3, 2, 13, 37), (3, 3, 0, 1, True)), ((2, 3, 33, 70), ((2, 3),)), ((2, 3, 33, 70),
          ((3, 2), None, 0, 1, True)),
          ((3, 3, 17, 34), (2,)), ((2, 3, 17, 33), (2, 2, 0, 1, True)), ((1, 3, 21, 66), (4,)), ((1, 2, 31, 46), (15,)),
          ((4, 3, 6, 24), (2,)), ((5, 3, 9, 9), (3,)), ((2, 2, 4, 64), (2,)),
          # A last window that is cut off where the windows fill whole vectors; rows of 2x2 that end within one.
          ((2, 3, 6, 63), (2, 2, 0, 1, True)), ((2, 3, 20, 95), ((3, 2), None, 0, 1, True)),
          ((3, 7, 9, 11), (2,)), ((3, 5, 6, 10), (2,)), ((2, 3, 5, 25), (2,)),
          # The same for 3x3 by 2: two narrow planes to a vector, one to four strips of a row, more.
          ((5, 5, 13, 13), (3, 2)), ((3, 5, 14, 16), (3, 2, 1)), ((3, 6, 12, 9), (3, 2, 1, 1, True)),
          ((3, 5, 9, 27), (3, 2)),
          ((3, 2, 9, 55), (3, 2)), ((3, 2, 10, 90), (3, 2, 1)), ((3, 2, 9, 113), (3, 2)), ((2, 3, 7, 200), (3, 2, 1)),
          # As many columns as the windows have, yet the padding shifts the last one away from under them.
          ((3, 27, 18, 30), (3, 3, 1)), ((2, 3, 4, 14), (2, (3, 2), (1, 0))),
          # The same for 3x3 by 1.
          ((5, 5, 6, 14), (3, 1, 1)), ((3, 4, 7, 28), (3, 1, 1)), ((3, 9, 2, 2), (3, 1, 1)), ((3, 5, 5, 70), (3, 1, 1)),
          ((2, 3, 3, 256), (3, 1, 1)), ((2, 3, 3, 257), (3, 1, 1)), ((3, 4, 8, 16), (3, 1, 1)),
          # Wider ones, along the columns and then the rows: planes at the tensor's ends and inside, blocks of channels.
          ((7, 5, 9, 13), (5, 1, 2)), ((1, 32, 20, 20), (5, 1, 2)), ((2, 16, 7, 20), (7, 1, 3)),
          ((2, 3, 11, 8), ((3, 7), 1, (1, 3))), ((1, 48, 4, 120), (5, 1, 2)), ((5, 4, 13, 11), (5, 1, 2)),
          ((3, 4, 7, 1), (7, 1, 3)), ((3, 5, 8, 90), ((3, 85), 1, (1, 42))),
          # channels_last: more windows in a row than are taken together, of short pixels of pixels with a rest; bands
          # of rows cut inside an image; channels and columns in tiles; a buffer of some channels, of some rows.
          ((1, 3, 5, 300), (3, 1)), ((1, 20, 4, 140), (2, 1)), ((2, 5, 20, 20), (17, 1, 8)),
          ((1, 48, 6, 40), (3, 2, 1)), ((1, 5, 40, 30), (3, 1, 1)), ((1, 260, 9, 9), (7, 1, 3)),
          ((1, 70, 4, 130), (3, 1, 1)), ((1, 40, 24, 24), (5, 1, 2)), ((1, 2, 150, 150), (5, 3, 2)),
          ((2, 9, 12, 14), (3, 1)),
          # Rows of one window or two: short and long ones, small planes and others; of maxima, a plane as one row.
          ((3, 5, 6, 6), (4,)), ((2, 3, 7, 5), ((1, 3), None, (0, 1))), ((2, 3, 40, 33), ((3, 33), (1, 33))),
          ((2, 3, 70, 64), ((3, 32), (2, 32))), ((1, 2, 300, 4), (3, 2)), ((2, 5, 9, 13), (3,)),
          ((2, 33, 9, 8), (1,)), ((1, 30, 10, 9), (2, 3)),
          # A plane a lane: fewer planes than lanes and more; planes in several pieces whose windows overlap, or have
          # rows between them; taps of four bytes.
          ((3, 11, 7, 5), (3, 2, 1)), ((2, 9, 300, 7), (5, 3, 2)), ((1, 19, 90, 23), (2, 5, 1, 2)),
          ((3, 6, 40, 21), (20, 20)), ((2, 17, 13, 9), ((4, 2), (4, 2), 0, 1, True)),
          ((1, 35, 3, 3), (3, 3)),
          # The first window's taps, dilated and padded, begin below the second's.
          ((2, 17, 13, 8), (5, 1, 1, 2)), ((3, 11, 15, 6), (3, 1, 1, 2)),
          # Scattered: outputs eight at a time and what is left, of a plane and of a row.
          ((5, 3, 14, 13), (5, 3)), ((3, 3, 16, 40), (4, 3, 1)), ((1, 2, 70, 61), (5, 2, 2)),
          # channels_last: pixels under few windows, those listed for all channels.
          ((2, 33, 9, 12), (3, 2, 1)), ((2, 20, 11, 7), ((2, 4), 1, 0, 2)),
          # 16-bit sums of some rows of a large plane, also with rows under no window; few sums in a small plane.
          ((1, 2, 200, 170), ((2, 5), (5, 3))), ((1, 3, 140, 130), (4, 3, 2, 3)), ((2, 5, 40, 40), (9, 8)),
          # channels_last: such sums in a ring of rows, of all channels, of some; a last vector over the one before.
          ((1, 3, 70, 50), (5, 2, 1, 3)), ((2, 35, 40, 30), (7, 2, 0, 3)), ((1, 21, 30, 64), ((9, 2), (4, 1))),
          ((1, 40, 40, 30), (9, 8)),
          # Rows of two vectors at most, looked up by permutations, and just more; outputs of two, inputs of more.
          ((2, 9, 12, 32), (3, 1, 1)), ((2, 9, 7, 31), (5, 1, 2)), ((1, 9, 9, 16), (4, 3)), ((1, 9, 9, 15), (3, 1, 1)),
          ((1, 5, 9, 62), (3, 2, 1)), ((1, 5, 9, 33), (5, 2, 2)),
          # Long windows: several vectors of a row, several pixels to a vector.
          ((2, 3, 50, 77), ((9, 40), (9, 37))), ((1, 5, 20, 130), ((3, 64), (2, 66))),
          ((2, 6, 9, 40), (7, 1, 3))]  # fmt: skip
ADAPTIVE = [((2, 5, 12, 24), 1), ((2, 5, 12, 24), (3, 5)), ((2, 5, 12, 24), (6, 12)), ((3, 6, 13, 13), 6),
            ((1, 2, 30, 70), (7, 33)),
            ((1, 3, 5, 4), (7, 9)), ((5, 1, 37, 18), (2, 17)), ((1, 2, 18, 17), (1, 1)), ((2, 19, 40, 40), 3),
            ((2, 3, 50, 50), 3), ((2, 17, 130, 10), (7, 4)), ((3, 13, 5, 6), (8, 7)), ((3, 7, 1, 1), 1),
            ((2, 3, 41, 90), 2), ((2, 2, 60, 121), (1, 3)), ((1, 3, 200, 170), (3, 1)),
            # A remainder of one, in both dimensions and in one: windows of one size.
            ((3, 5, 13, 29), (4, 7)), ((2, 3, 57, 9), (28, 8)), ((2, 3, 13, 14), (6, 4)), ((2, 3, 1, 13), (2, 3)),
            ((1, 2, 41, 35), (8, 34)), ((1, 150, 13, 14), 2)]  # fmt: skip
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def special(shape, generator_seed=0):
    """Few distinct values, so most windows tie; rows of -inf, both zeros, and NaN here and there."""
    g = torch.Generator().manual_seed(generator_seed)
    x = torch.randint(-1, 3, shape, generator=g).float()
    x[x == 0] *= torch.where(torch.rand(int((x == 0).sum()), generator=g) < 0.5, 1.0, -1.0)
    x[..., : shape[-2] // 3, :] = -float("inf")
    x[torch.rand(shape, generator=g) < 0.02] = float("nan")
    x[torch.rand(shape, generator=g) < 0.02] = -float("nan")
    x[torch.rand(shape, generator=g) < 0.02] = float("inf")
    return x


def same(a, b):
    """Equal values; any NaN equals any other."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(77.0), b.nan_to_num(77.0))


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "op, shape, windows",
    [("max_pool2d", *args) for args in SHAPES] + [("adaptive_max_pool2d", shape, (size,)) for shape, size in ADAPTIVE],
    ids=str,
)
def test_ties_and_nan(op, shape, windows, layout, dtype, isa):
    fastnn._C.set_isa(isa)
    ours, torchs = getattr(fastnn.functional, op), getattr(F, op)
    x = special(shape).to(dtype).contiguous(memory_format=layout)
    y, indices = ours(x, *windows, return_indices=True)
    ty, tindices = torchs(x, *windows, return_indices=True)
    assert same(y, ty) and torch.equal(indices, tindices)
    assert same(ours(x, *windows), ty)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    g = torch.randint(-8, 8, y.shape).to(dtype)  # sums exactly, in any order
    ours(a, *windows).backward(g)
    torchs(b, *windows).backward(g)
    assert same(a.grad, b.grad)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "op, shape, arguments",
    [("adaptive_avg_pool2d", shape, (size,)) for shape, size in ADAPTIVE]
    + [("avg_pool2d", *args) for args in SHAPES if len(args[1]) < 4],
    ids=str,
)
def test_averages_of_every_isa(op, shape, arguments, layout, isa):
    fastnn._C.set_isa(isa)
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = getattr(fastnn.functional, op)(x, *arguments), getattr(F, op)(exact, *arguments)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    g = torch.randn_like(y)
    (dx,), (exact_dx,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, exact, g.double())
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1e-6, atol=1e-6)


def test_windows_without_a_tap():  # torch's own gradient of these writes outside its plane
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    for layout in LAYOUTS:
        a = x.contiguous(memory_format=layout)
        y = fastnn.functional.max_pool2d(a, 2, 4, 1, 4)
        assert torch.equal(y, F.max_pool2d(a, 2, 4, 1, 4)) and y.max() == -float("inf")
        assert not torch.autograd.grad(y, x, torch.ones_like(y))[0].any()


def test_all_minus_infinity():
    x = torch.full((1, 2, 6, 6), -float("inf"), requires_grad=True)
    y, indices = fastnn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert torch.equal(indices, F.max_pool2d(x, 3, 2, 1, return_indices=True)[1])
    y.sum().backward()
    assert x.grad.sum() == y.numel()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "op, shape, windows",
    [("max_pool2d", *args) for args in SHAPES]
    + [("avg_pool2d", *args) for args in SHAPES if len(args[1]) < 4]
    + [(op, shape, (size,)) for op in ("adaptive_max_pool2d", "adaptive_avg_pool2d") for shape, size in ADAPTIVE],
    ids=str,
)
def test_same_bits_for_every_thread_count(op, shape, windows, layout):
    x = torch.randn(7, *shape[1:]).contiguous(memory_format=layout).requires_grad_()

    def step():
        y = getattr(fastnn.functional, op)(x, *windows)
        return [y, *torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view(y.shape))]

    assert_same_bits_for_every_thread_count(step)


@pytest.mark.parametrize("n", [3, 7, 49, 1001])
def test_average_of_equal_integers_is_exact(n):
    x = torch.full((2, 3, 14, 14), float(n))
    for y in (fastnn.functional.avg_pool2d(x, 7), fastnn.functional.adaptive_avg_pool2d(x, (1, 2))):
        assert torch.equal(y, torch.full_like(y, float(n)))
    assert torch.equal(fastnn.functional.avg_pool2d(x, 3, 2), F.avg_pool2d(x, 3, 2))


def test_backward_keeps_one_byte_per_output():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = fastnn.functional.max_pool2d(x, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fastnn.functional.max_pool2d(x, 2)
        fastnn.functional.avg_pool2d(x, 2)
    assert [t.dtype for t in kept] == [torch.uint8] and kept[0].numel() == y.numel()


@pytest.mark.parametrize(
    "shape, size", [((1, 1, 43, 43), 3), ((1, 1, 46, 46), 3), ((1, 1, 44, 43), 3), ((1, 1, 1, 9), 2)]
)
def test_offsets_are_as_wide_as_tracing_thinks(shape, size):
    op = torch.ops.fastnn.adaptive_max_pool2d_with_offsets
    with torch._subclasses.FakeTensorMode():
        fake = op(torch.empty(shape), [size, size])
    assert [t.dtype for t in fake] == [t.dtype for t in op(torch.randn(shape), [size, size])]


def test_integers_run_on_torch_and_are_counted():
    x = torch.randint(-9, 9, (1, 2, 8, 8))
    assert torch.equal(fastnn.functional.max_pool2d(x, 2), F.max_pool2d(x, 2))
    y, i = fastnn.functional.max_pool2d(x, 2, return_indices=True)
    ty, ti = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, ty) and torch.equal(i, ti)
    assert sum(fastnn.fallbacks().values()) == 2


MODULES = [
    ("MaxPool2d", (2,), {}), ("MaxPool2d", (3, 2, 1), {"dilation": 1, "ceil_mode": True}),
    ("MaxPool2d", (2,), {"return_indices": True}), ("AvgPool2d", (2,), {}),
    ("AvgPool2d", (3, 2, 1), {"count_include_pad": False, "divisor_override": 2}),
    ("AdaptiveAvgPool2d", ((None, 3),), {}), ("AdaptiveAvgPool2d", (1,), {}),
    ("AdaptiveMaxPool2d", (2,), {}), ("AdaptiveMaxPool2d", (2, True), {}),
]  # fmt: skip


@pytest.mark.parametrize("name, args, kwargs", MODULES, ids=str)
def test_module(name, args, kwargs):
    ours, torchs = getattr(fastnn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(torchs)
    x = torch.randn(2, 3, 8, 9)
    for module in (ours, copy.deepcopy(ours)):
        torch.testing.assert_close(module(x), torchs(x))


@pytest.mark.parametrize("name, args, kwargs", MODULES, ids=str)
def test_compiles_whole(name, args, kwargs):
    torch._dynamo.reset()
    module = getattr(fastnn, name)(*args, **kwargs)
    x = torch.randn(2, 3, 8, 9, requires_grad=True)

    def function(x):
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))
    g = torch.randn_like(function(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x, g), torch.autograd.grad(function(x), x, g))


def test_backward_refuses_what_does_not_fit():
    backward = torch.ops.fastnn.max_pool2d_backward
    g, offsets = torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    assert backward(g, offsets, [8, 8], [2, 2], [2, 2], [0, 0], [1, 1], False).sum().isclose(g.sum())
    for bad in [
        (g, offsets, [4, 8], [2, 2], [2, 2], [0, 0], [1, 1], False),
        (g, offsets[..., :2], [8, 8], [2, 2], [2, 2], [0, 0], [1, 1], False),
        (g, offsets.int(), [8, 8], [2, 2], [2, 2], [0, 0], [1, 1], False),
        (g.int(), offsets, [8, 8], [2, 2], [2, 2], [0, 0], [1, 1], False),
        (g[0], offsets[0], [8, 8], [2, 2], [2, 2], [0, 0], [1, 1], True),
    ]:
        with pytest.raises(RuntimeError, match="do not fit"):
            backward(*bad)
    with pytest.raises(RuntimeError, match="does not fit"):
        torch.ops.fastnn.avg_pool2d_backward(g.requires_grad_(), [8, 8], [2, 2], [], [], False, True, None, False)


@pytest.mark.parametrize("op", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
@pytest.mark.parametrize(("shape", "output_size"), [((0, 2, 6, 6), 0), ((2, 3, 6, 6), (0, 2)), ((0, 6, 6), 2)])
def test_planes_that_only_torch_takes(op, shape, output_size):
    """Empty outputs and channels: forward and backward are torch's, with its results or its errors."""

    def outcome(function):
        x = torch.randn(shape, requires_grad=True)
        try:
            y = function(x, output_size)
            return y.shape, torch.autograd.grad(y.sum(), x)[0].shape
        except (RuntimeError, IndexError) as error:
            return str(error)

    assert outcome(getattr(fastnn.functional, op)) == outcome(getattr(torch.nn.functional, op))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "op,windows,columns",
    [("max_pool2d", (3, 2, 1), 144), ("max_pool2d", (3, 2), 28), ("avg_pool2d", (2,), 144)]
    + [("max_pool2d", (size,), columns) for size, columns in [(2, 144), (2, 110), (2, 101), (4, 100), ((4, 2), 101)]],
)
def test_gradient_past_the_caches(op, windows, columns, layout):
    """A gradient of 13 to 18 MB, written past the caches, also where rows end within a line; the input is fetched by
    hand."""
    shape = (7, 603, 28, 28) if columns == 28 else (4, 64, 128, columns)
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    y = getattr(fastnn.functional, op)(x, *windows)
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(getattr(F, op)(x, *windows), x, grad)
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape, windows", SHAPES, ids=str)
def test_every_element_of_the_gradient_is_written(shape, windows, layout, isa):
    """Under deterministic algorithms torch fills new memory with NaN."""
    fastnn._C.set_isa(isa)
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    ops = ["max_pool2d", "avg_pool2d"] if len(windows) < 4 else ["max_pool2d"]
    torch.use_deterministic_algorithms(True)
    try:
        for op in ops:
            y = getattr(fastnn.functional, op)(x, *windows)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert not dx.isnan().any() and not y.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape, windows", [*SHAPES, ((2, 3, 9, 2200), (3, 2)), ((3, 3, 32, 32), (3, 2))], ids=str)
def test_planes_do_not_see_their_neighbours(shape, windows, layout, isa):
    """Vectors are read past the end of a row and of a plane: what lies there leaves the results as they are."""
    fastnn._C.set_isa(isa)
    x = torch.randn(shape).contiguous(memory_format=layout)
    spoilt = x.clone()
    planes = torch.arange(shape[0] * shape[1]).view(shape[:2])
    spoilt[planes % 2 == 1] = torch.nan
    for op in ["max_pool2d", "avg_pool2d"] if len(windows) < 4 else ["max_pool2d"]:
        for gradient in (False, True):
            expected, actual = [
                getattr(fastnn.functional, op)(t.clone().requires_grad_(gradient), *windows)[planes % 2 == 0]
                for t in (x, spoilt)
            ]
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("size, windows", [(32, (3, 2)), (64, (3, 2)), (40, (3, 2)), (35, (3, 3)), (71, (5, 4))])
def test_what_no_window_covers_is_not_seen(size, windows, op, layout, isa):
    """The last rows and columns, where windows end before the plane."""
    fastnn._C.set_isa(isa)
    function, (kernel, stride) = getattr(fastnn.functional, op), windows
    covered = (size - kernel) // stride * stride + kernel
    assert covered < size
    x = torch.randn(3, 5, size, size).contiguous(memory_format=layout)
    spoilt = x.clone()
    spoilt[..., covered:], spoilt[..., covered:, :] = torch.inf, torch.nan
    assert torch.equal(function(x, *windows), function(spoilt, *windows))
