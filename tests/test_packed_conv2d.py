"""The packed convolution of frozen models: every algorithm, instruction set, layout and epilogue against float64."""

import pytest
import torch
import torch.nn.functional as TF
from compare import assert_same_bits_for_every_thread_count

import fastnn
from fastnn import _C

INF = float("inf")

# C, K, H, W, kernel, stride, padding, dilation, groups, the algorithm
SHAPES = [
    (3, 8, 9, 17, 7, 2, 3, 1, 1, "direct"),
    (1, 5, 9, 9, 3, 1, 1, 1, 1, "direct"),
    (5, 1, 4, 4, 1, 1, 0, 1, 1, "direct"),
    (64, 40, 7, 7, 1, 1, 0, 1, 1, "direct"),
    (40, 100, 7, 5, 1, 1, 0, 1, 1, "direct"),
    (48, 33, 13, 11, 1, 2, 0, 1, 1, "direct"),
    (24, 50, 7, 7, 3, 2, 1, 1, 1, "direct"),
    (16, 32, 8, 9, 3, 1, 2, 4, 1, "direct"),
    (70, 70, 3, 3, 3, 1, 1, 1, 1, "direct"),
    (128, 256, 1, 1, 1, 1, 0, 1, 1, "direct"),
    (512, 20, 5, 6, 3, 2, 1, 1, 1, "direct"),
    (1024, 24, 4, 5, 1, 2, 0, 1, 1, "direct"),
    (20, 24, 9, 11, 1, 3, 1, 1, 1, "direct"),
    (48, 64, 13, 15, 3, 2, 1, 1, 4, "direct"),  # groups, of half a panel, of parts of vectors, of two panels
    (39, 36, 9, 16, 3, 2, 1, 1, 3, "direct"),
    (96, 96, 14, 11, 3, 2, 1, 1, 2, "direct"),
    (32, 32, 12, 17, 7, 1, 3, 1, 2, "direct"),
    (20, 37, 16, 13, 3, 1, 1, 1, 1, "winograd"),
    (64, 40, 28, 28, 3, 1, 1, 1, 1, "winograd"),
    (130, 16, 16, 16, 3, 1, 0, 1, 1, "winograd"),
    (33, 17, 12, 12, 5, 1, 2, 1, 1, "winograd"),
    (40, 48, 19, 13, 2, 1, 1, 1, 1, "winograd"),
    (19, 34, 11, 14, 4, 1, 2, 1, 1, "winograd"),
    (64, 70, 28, 25, 3, 1, 2, 2, 1, "winograd"),  # a dilation's phases, some a column shorter
    (40, 48, 33, 34, 3, 1, 1, 3, 1, "winograd"),
    (64, 160, 12, 12, 3, 1, 1, 1, 1, "winograd"),  # few tiles: threads share out output channels
    (3, 40, 45, 38, 7, 2, 3, 1, 1, "winograd"),  # phases by strips, the others below in place
    (3, 33, 66, 51, 11, 4, 2, 1, 1, "winograd"),
    (20, 48, 23, 26, 5, 2, 2, 1, 1, "winograd"),
    (48, 128, 60, 80, 3, 2, 1, 1, 1, "winograd"),
    (32, 32, 22, 25, 6, 2, 0, 1, 1, "winograd"),
    (16, 50, 22, 19, 8, 2, 3, 1, 1, "winograd"),
    (16, 32, 28, 32, 10, 2, 4, 1, 1, "winograd"),
    (32, 32, 9, 9, 3, 1, 1, 1, 32, "depthwise"),
    (20, 20, 17, 19, 3, 2, 1, 1, 20, "depthwise"),
    (48, 48, 7, 7, 5, 1, 2, 1, 48, "depthwise"),
    (37, 37, 14, 15, 3, 2, 0, 1, 37, "depthwise"),
    (24, 24, 6, 1, 3, 1, 2, 1, 24, "depthwise"),
    (16, 16, 11, 11, 3, 1, 2, 2, 16, "depthwise"),
    (100, 100, 13, 22, 3, 1, 1, 1, 100, "depthwise"),  # four vectors of channels together, two and less than one
    (88, 88, 9, 30, 5, 2, 2, 1, 88, "depthwise"),
    (24, 24, 5, 23, 7, 1, 3, 1, 24, "depthwise"),  # a vector and a half, a known kernel's blocks of eight and of one
    (152, 152, 6, 11, 5, 1, 3, 1, 152, "depthwise"),
    (72, 72, 3, 3, 7, 1, 5, 1, 72, "depthwise"),
    (64, 64, 110, 102, 3, 2, 1, 1, 64, "depthwise"),  # three images leave the caches
    (18, 18, 10, 10, 7, 3, 3, 1, 18, "depthwise"),
    (6, 6, 2, 1, 5, 2, 3, 1, 6, "depthwise"),
]


@pytest.fixture(params=_C.isas())
def isa(request):
    before = _C.isa()
    assert _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def problem(shape, batch):
    c, k, h, w, size, stride, padding, dilation, groups, _ = shape
    generator = torch.Generator().manual_seed(1)
    make = lambda *s: torch.randn(s, generator=generator)  # noqa: E731
    geometry = (stride, padding, dilation, groups)
    x, weight, bias = make(batch, c, h, w), make(k, c // groups, size, size), make(k)
    kernel = _C.PackedConv2d((stride, stride), (padding, padding), (dilation, dilation), groups)
    scale = TF.conv2d(x.double().abs(), weight.double().abs(), None, *geometry).max()
    return kernel, x, weight, bias, TF.conv2d(x.double(), weight.double(), None, *geometry), scale


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(isa, shape, batch):
    kernel, x, weight, bias, product, scale = problem(shape, batch)
    # A plain sum of float32 and the declared bound of Winograd.
    bound = scale * (2.0**-17 if shape[-1] == "winograd" else 2.0**-20)
    residual = torch.randn(product.shape, generator=torch.Generator().manual_seed(2))
    b = bias.double()[:, None, None]
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.expand(2, *x.shape)[1]):
        y = kernel(given, weight, None, None, -INF, INF)
        assert kernel.algorithm() == shape[-1]
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (y - product).abs().max() <= bound
        y = kernel(given, weight, bias, None, 0.0, 6.0)
        assert (y - (product + b).clamp(0, 6)).abs().max() <= bound + 1e-6
        for r in (residual, residual.contiguous(memory_format=torch.channels_last)):
            y = kernel(given, weight, bias, r, 0.0, INF)
            assert (y - (product + b + r).relu()).abs().max() <= bound + 1e-6


@pytest.mark.parametrize("shape", [(64, 40, 7, 7), (37, 50, 30, 5), (520, 48, 20, 21), (16, 16, 1, 1)], ids=str)
def test_norm_and_relu_in_front(isa, shape):
    c, k, h, w = shape
    generator = torch.Generator().manual_seed(3)
    make = lambda *s: torch.randn(s, generator=generator)  # noqa: E731
    kernel, weight, bias = _C.PackedConv2d((1, 1), (0, 0), (1, 1), 1), make(k, c, 1, 1), make(k)
    scale, shift, wide = make(c), make(c), make(2, c + 8, h, w).contiguous(memory_format=torch.channels_last)
    for x in (wide[:, :c], wide[:, :c].contiguous(), wide[:1, 8:]):  # a slice of channels is read in place
        front = (x.double() * scale.double()[:, None, None] + shift.double()[:, None, None]).relu()
        y = kernel(x, weight, bias, None, 0.0, INF, scale, shift)
        bound = 2.0**-20 * TF.conv2d(front.abs(), weight.double().abs()).max() + 1e-6
        assert kernel.algorithm() == "direct"
        assert (y - TF.conv2d(front, weight.double(), bias.double()).relu()).abs().max() <= bound
        plain = TF.conv2d(x.double(), weight.double(), bias.double())
        assert (kernel(x, weight, bias, None, -INF, INF) - plain).abs().max() <= 8 * bound
    assert _C.PackedConv2d((2, 2), (0, 0), (1, 1), 1)(wide[:, :c], weight, None, None, 0.0, INF, scale, shift) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_and_repetition_give_the_same_bits(shape):
    kernel, x, weight, bias, *_ = problem(shape, 2)
    assert_same_bits_for_every_thread_count(lambda: [kernel(x, weight, bias, None, 0.0, INF)], (1, 2, 3, 1))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] == "direct" and s[0] != 70 and s[1] > 16], ids=str)
def test_images_shared_out_whole_have_the_bits_of_divided_ones(shape):
    kernel, x, weight, bias, product, scale = problem(shape, 9)  # whole by two threads, divided by three
    assert_same_bits_for_every_thread_count(lambda: [kernel(x, weight, bias, None, 0.0, INF)])
    assert kernel.algorithm() == "direct"
    wanted = (product + bias[:, None, None]).relu()
    assert (kernel(x, weight, bias, None, 0.0, INF) - wanted).abs().max() <= 2.0**-20 * scale + 1e-6


def test_non_finite_values_pass_as_in_torch():
    kernel = _C.PackedConv2d((1, 1), (0, 0), (1, 1), 1)
    x, weight = torch.tensor([float("nan"), INF, -INF, -1.0, 8.0]).view(5, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for high, wanted in ((INF, TF.relu(x)), (6.0, TF.relu6(x))):
        assert torch.equal(kernel(x, weight, None, None, 0.0, high).nan_to_num(77.0), wanted.nan_to_num(77.0))


ONE_OF_EACH = {shape[-1]: shape for shape in SHAPES}  # an algorithm's last


@pytest.mark.parametrize("shape", [(2, 10, 28, 28, 5), (6, 16, 14, 14, 5), (10, 20, 12, 12, 5)], ids=str)
def test_batches_to_few_channels_are_left_to_conv2d(shape):
    for batch, left in ((1, False), (11, False), (64, True)):
        kernel, x, weight, bias, product, scale = problem((*shape, 1, 0, 1, 1, ""), batch)
        lying = x.contiguous(memory_format=torch.channels_last)
        assert (kernel(lying, weight, bias, None, 0.0, INF) is None) == left
    frozen = fastnn.fuse(torch.nn.Sequential(torch.nn.Conv2d(*shape[:2], 5), torch.nn.ReLU()).eval())
    layer = next(m for m in frozen.modules() if hasattr(m, "weight"))
    layer.weight, layer.bias = weight, bias
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            assert (frozen(given) - (product + bias[:, None, None]).relu()).abs().max() <= 2.0**-17 * scale


@pytest.mark.parametrize("channels", [1, 3, 32])
def test_planes_to_few_channels_are_left_to_conv2d(channels):
    """From 128 pixels for each output channel on; channels_last images and smaller ones are packed."""
    for size, left in ((16, False), (32, True)):
        kernel, x, weight, bias, *_ = problem((channels, 8, size, size, 3, 1, 1, 1, 1, ""), 1)
        assert (kernel(x, weight, bias, None, 0.0, INF) is None) == left
        if channels > 1:
            x = x.contiguous(memory_format=torch.channels_last)
            assert kernel(x, weight, bias, None, 0.0, INF) is not None


def test_both_layouts_are_packed_for():
    kernel, x, weight, bias, product, scale = problem(ONE_OF_EACH["winograd"], 1)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x):
        assert (kernel(given, weight, None, None, -INF, INF) - product).abs().max() <= 2.0**-17 * scale
    wide = torch.randn(2, x.shape[1] + 3, x.shape[2] + 2, x.shape[3] + 5)
    for given in (wide, wide.contiguous(memory_format=torch.channels_last)):
        part = given[:, 1:-2, 1:-1, 2:-3]
        exact = TF.conv2d(part.double(), weight.double(), None, 2, 4)
        assert (kernel(part, weight, None, None, -INF, INF) - exact).abs().max() <= 2.0**-17 * scale


def test_few_tiles_beside_a_large_weight_are_direct():
    for size, algorithm in ((7, "direct"), (14, "winograd")):
        kernel, x, weight, *_ = problem((512, 512, size, size, 3, 1, 1, 1, 1, algorithm), 1)
        kernel(x, weight, None, None, 0.0, INF)
        assert kernel.algorithm() == algorithm


@pytest.mark.parametrize("norm", [False, True])
def test_the_choice_does_not_depend_on_the_threads(norm):
    shape = (600, 64, 10, 10, 1, 1, 0, 1, 1, "direct") if norm else (256, 256, 60, 60, 3, 1, 1, 1, 1, "winograd")
    kernel, x, weight, bias, *_ = problem(shape, 4)
    front = [torch.rand(shape[0]) for _ in range(2 * norm)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 90):  # of 90 the workspaces together are more than is allowed
            torch.set_num_threads(threads)
            results.append(kernel(x, weight, bias, None, 0.0, INF, *front))
            assert kernel.algorithm() == shape[-1]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", ONE_OF_EACH.values(), ids=str)
def test_a_changed_weight_is_packed_again(shape):
    kernel, x, weight, bias, product, scale = problem(shape, 1)
    kernel(x, weight, bias, None, -INF, INF)
    weight.mul_(2), bias.zero_()
    assert (kernel(x, weight, bias, None, -INF, INF) - 2 * product).abs().max() <= 2.0**-16 * scale
    other = weight.clone().mul_(0.5)
    assert (kernel(x, other, bias, None, -INF, INF) - product).abs().max() <= 2.0**-17 * scale


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", ["assigned", "loaded", "loaded and assigned", "cast", "other data"])
def test_a_replaced_weight_is_packed_again(how, inference):
    with torch.inference_mode(inference), torch.no_grad():
        frozen = fastnn.fuse(torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1)).eval())
        layer = next(m for m in frozen.modules() if hasattr(m, "weight"))
        x = torch.randn(1, 16, 12, 12)
        frozen(x)
        for _ in range(20):
            for _ in range(2):  # the second weight likes to take the address that the one before the first had
                other = {name: torch.randn_like(t) for name, t in frozen.state_dict().items()}
                if how == "assigned":
                    layer.weight = torch.randn_like(layer.weight)
                elif how == "other data":
                    layer.weight.data = torch.randn_like(layer.weight)
                elif how == "cast":
                    frozen.bfloat16().float()
                else:
                    frozen.load_state_dict(other, assign="assign" in how)
            exact = TF.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
            assert (frozen(x) - exact).abs().max() <= 1e-3


def test_what_it_does_not_take():
    kernel, x, weight, bias, *_ = problem(SHAPES[0], 1)
    call = lambda *a: kernel(*a, -INF, INF)  # noqa: E731
    assert call(x.double(), weight.double(), None, None) is None
    assert call(x, weight, bias.double(), None) is None
    assert call(x[:, :2], weight, bias, None) is None
    assert call(x[0], weight, bias, None) is None
    assert call(x[:0], weight, bias, None) is None
    assert call(x[..., :2, :], weight, bias, None) is not None
    assert call(torch.randn(1, 3, 0, 5), weight, bias, None) is None
    assert call(x, weight, bias, torch.ones(8, 1, 1)) is None
    grouped = _C.PackedConv2d((1, 1), (0, 0), (1, 1), 2)
    assert grouped(torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3), None, None, 0.0, 1.0) is None
    with fastnn.disabled():
        assert call(x, weight, bias, None) is None


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] == "winograd"], ids=str)
def test_strict_mode_forbids_winograd(shape):
    kernel, x, weight, bias, product, scale = problem(shape, 1)
    for strict in (True, False, True):
        with fastnn.set_strict_conv(strict):
            y = kernel(x, weight, None, None, -INF, INF)
        assert kernel.algorithm() == ("direct" if strict else "winograd")
        assert (y - product).abs().max() <= 2.0 ** (-20 if strict else -17) * scale


def test_autocast_runs_the_plain_layer():
    kernel, x, weight, bias, *_ = problem(SHAPES[0], 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel(x, weight, bias, None, -INF, INF) is None
