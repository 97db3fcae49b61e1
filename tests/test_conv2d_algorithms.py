"""Every convolution algorithm on every case it takes, and random layers by the algorithm of their choice."""

import itertools

import pytest
import torch
from cases import CONV2D
from compare import assert_same_bits_for_every_thread_count, compare
from picks import choose_from, numbers_from
from torch.nn.functional import conv2d as torch_conv2d

import fastnn

LAYOUTS = [torch.contiguous_format, torch.channels_last]
F32 = [c for c in CONV2D if c.args[0].shape[0] > 0]


def assert_plain_sums(generator, inputs, *arguments):
    """The layer (input, weight, bias) and its gradients against float64, to the rounding of plain float32 sums."""
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = fastnn.functional.conv2d(*inputs, *arguments), torch_conv2d(*doubles, *arguments)
    g = torch.randn(y.shape, generator=generator)
    ours = [y, *torch.autograd.grad(y, inputs, g)]
    theirs = [expected, *torch.autograd.grad(expected, doubles, g.double())]
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 * float(e.detach().abs().max()))


@pytest.mark.parametrize("algorithm", ["reference", "shift", "depthwise", "gemm"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", F32, ids=lambda c: c.name)
def test_plain_sums(case, layout, algorithm, forced):
    assert forced(algorithm)
    compare(case, torch.float32, layout)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_depthwise_on_random_shapes(isa, layout, forced):
    """Images of every width below and around a vector's, all paddings, strides 1 and 2."""
    assert fastnn._C.set_isa(isa) and forced("depthwise")
    generator = torch.Generator().manual_seed(5)
    pick = choose_from(generator)
    sizes = (1, 2, 3, 5, 7, 8, 9, 13, 14, 15, 16, 17, 31, 32, 33, 50)
    for _ in range(150):
        kernel, stride, c = pick(3, 5), pick(1, 2), pick(2, 3, 9, 17, 40)
        padding = (kernel // 2,) * 2 if pick(0, 1) else (pick(*range(kernel)), pick(*range(kernel)))
        n, h, w = pick(1, 2), max(pick(*sizes), kernel - 2 * padding[0]), max(pick(*sizes), kernel - 2 * padding[1])
        x = torch.randn(n, c, h, w, generator=generator).contiguous(memory_format=layout)
        weight = torch.randn(c, 1, kernel, kernel, generator=generator)
        inputs = [
            t.requires_grad_() for t in (x, weight.mT if pick(0, 1) else weight, torch.randn(c, generator=generator))
        ]
        assert_plain_sums(generator, inputs, stride, padding, 1, c)


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_few_channels_together_on_random_shapes(isa, forced):
    """Images of two to four channels in NHWC, read in place: borders or none, strides, dilations."""
    assert fastnn._C.set_isa(isa) and forced("gemm")
    generator = torch.Generator().manual_seed(8)
    pick = choose_from(generator)
    for _ in range(40):
        n, c, k, kernel, stride, dilation = (
            pick(1, 3),
            pick(2, 3, 4),
            pick(16, 32, 48, 80),
            pick(2, 3, 5),
            pick(1, 2),
            pick(1, 2),
        )
        padding, reach = pick(0, 1, 2), (kernel - 1) * dilation + 1
        x = torch.randn(n, c, reach + pick(0, 3, 12, 31), reach + pick(0, 1, 8, 29), generator=generator)
        weight = torch.randn(k, c, kernel, kernel, generator=generator)
        inputs = [
            x.contiguous(memory_format=torch.channels_last).requires_grad_(),
            (weight.mT if pick(0, 1) else weight).requires_grad_(),
            torch.randn(k, generator=generator, requires_grad=True),
        ]
        assert_plain_sums(generator, inputs, stride, padding, dilation, 1)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("algorithm", ["", "gemm", "shift"])
def test_strided_gradients_of_few_outputs(isa, layout, algorithm, forced):
    """The phases of a stride, whose last pixels reach further past grad_output than its padding before the first."""
    assert fastnn._C.set_isa(isa) and forced(algorithm)
    generator = torch.Generator().manual_seed(10)
    pick = choose_from(generator)
    for _ in range(30):
        kernel, stride, dilation = (
            [pick(1, 2, 3, 5, 6), pick(1, 2, 3, 5, 8)],
            [pick(1, 2, 5), pick(2, 3)],
            pick(1, 1, 3),
        )
        reach = [dilation * (r - 1) for r in kernel]
        padding = [pick(*range(r + 1)) for r in reach]
        size = [max(1, r + 1 - 2 * p) + pick(*range(14)) for r, p in zip(reach, padding, strict=True)]
        groups, c, k = pick(1, 1, 3), pick(16, 32, 48), pick(2, 3, 4)
        x = torch.randn(pick(1, 2, 17), c * groups, *size, generator=generator).contiguous(memory_format=layout)
        weight = torch.randn(k * groups, c, *kernel, generator=generator).contiguous(memory_format=layout)
        inputs = [t.requires_grad_() for t in (x, weight, torch.randn(k * groups, generator=generator))]
        with fastnn.set_strict_conv(True):
            assert_plain_sums(generator, inputs, stride, padding, dilation, groups)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("channels_last", [False, True])
def test_pointwise_on_random_shapes(isa, channels_last, forced):
    """Every matrix product a 1x1 layer becomes: images of one pixel (a squeeze layer), small ones, many, strided."""
    assert fastnn._C.set_isa(isa) and forced("gemm")
    generator = torch.Generator().manual_seed(7)
    pick = choose_from(generator)
    for _ in range(60):
        n, side = pick(1, 2, 5, 33, 70), pick(1, 1, 2, 3, 4, 7, 8, 9)
        c, k = pick(1, 3, 16, 33, 530, 1100), pick(1, 5, 16, 37)
        x = torch.randn(n, c, side + 1, side + 2, generator=generator)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        x = x[:, :, :side, 1 : side + 1] if pick(0, 1) else x[:, :, :side, :side].clone()
        weight = torch.randn(k, c, 1, 1, generator=generator)
        inputs = [t.requires_grad_() for t in (x, weight, torch.randn(k, generator=generator))]
        assert_plain_sums(generator, inputs)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_few_pixels_on_random_shapes(isa, layout, forced):
    """Up to 256 output pixels: rows of 4 KB, one to four pixels past a vector, several images, taps in chunks."""
    assert fastnn._C.set_isa(isa) and forced("gemm")
    generator = torch.Generator().manual_seed(11)
    pick = choose_from(generator)
    for i in range(60):
        n, c, k, stride, padding = pick(1, 2, 3), pick(7, 64, 130, 341), pick(5, 9, 29, 100), pick(1, 2), pick(0, 1, 2)
        kernel, size = pick(2, 3, 5), [pick(6, 7, 9, 13, 14) if n == 1 else pick(6, 7) for _ in range(2)]
        if i % 4 == 0:  # pointwise; in channels_last a weight much larger than the image
            n, c, k, kernel, stride, padding = 1, pick(256, 1024), pick(530, 600), 1, 1, 0
        x = torch.randn(n, c, *size, generator=generator).contiguous(memory_format=layout)
        weight = torch.randn(k, c, kernel, kernel, generator=generator).contiguous(memory_format=layout)
        bias = torch.randn(k, generator=generator) if pick(0, 1) else None
        y = fastnn.functional.conv2d(x, weight, bias, stride, padding)
        exact, theirs = (
            torch_conv2d(x.to(t), weight.to(t), None if bias is None else bias.to(t), stride, padding)
            for t in (torch.float64, torch.float32)
        )
        assert y.stride() == theirs.stride()
        ours, theirs = (float((a - exact).square().mean().sqrt()) for a in (y, theirs))
        assert ours <= 2 * theirs, (n, c, k, kernel, stride, size, padding)


def test_thin_pointwise_layers_are_products():
    """1x1 of 8 channels, small and large batches; shift and batch took 1.4 and 1.7 times as long."""
    for n, size in ((1, 56), (32, 14)):
        x, weight = torch.randn(n, 8, size, size), torch.randn(24, 8, 1, 1)
        assert fastnn._C.conv2d_algorithm(x, weight, [1, 1], [0, 0], [1, 1], 1, "forward") == "gemm"


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_pointwise_results(isa, layout):
    """More than the caches keep, which is written past them: tiles within an image, of two images, and odd planes."""
    assert fastnn._C.set_isa(isa)
    generator = torch.Generator().manual_seed(13)
    for n, c, size, k, groups in [(7, 8, 112, 64, 1), (56, 6, 28, 128, 1), (7, 16, 112, 64, 2), (9, 5, 111, 48, 1)]:
        x = torch.randn(n, c, size, size, generator=generator).contiguous(memory_format=layout)
        weight = torch.randn(k, c // groups, 1, 1, generator=generator)
        for bias in (torch.randn(k, generator=generator), None):

            def large(x=x, weight=weight, bias=bias, groups=groups):
                return [fastnn.functional.conv2d(x, weight, bias, groups=groups)]

            assert_same_bits_for_every_thread_count(large)
            y = large()[0]
            for i in (0, n // 2, n - 1):
                image = fastnn.functional.conv2d(x[i : i + 1], weight, bias, groups=groups)
                torch.testing.assert_close(y[i : i + 1], image, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_thin_layers_of_planes_in_pages(isa):
    """Tiles of rows that run over all pixels one after the other: whole ones, a last one that is none, and groups."""
    assert fastnn._C.set_isa(isa)
    generator = torch.Generator().manual_seed(17)
    for n, c, size, k, groups in [(5, 4, 32, 96, 1), (3, 3, 64, 31, 1), (6, 16, 32, 60, 2), (9, 8, 32, 15, 1)]:
        x = torch.randn(n, c, size, size, generator=generator)
        weight = torch.randn(k, c // groups, 1, 1, generator=generator)
        for bias in (torch.randn(k, generator=generator), None):

            def thin(x=x, weight=weight, bias=bias, groups=groups):
                return [fastnn.functional.conv2d(x, weight, bias, groups=groups)]

            assert_same_bits_for_every_thread_count(thin)
            exact = torch_conv2d(x.double(), weight.double(), None if bias is None else bias.double(), groups=groups)
            torch.testing.assert_close(thin()[0].double(), exact, rtol=1e-5, atol=1e-5)


def test_pointwise_layers_in_groups_are_products():
    """One image of any number of channels, batches of five and more in a group; shift took up to 3 times as long."""
    layers = [((1, 1, 112), 10, 1), ((1, 8, 112), 16, 4), ((8, 240, 28), 60, 3), ((8, 24, 56), 48, 4)]
    for (n, c, size), k, groups in layers:
        x, weight = torch.randn(n, c, size, size), torch.randn(k, c // groups, 1, 1)
        for which in ("forward", "grad_input"):
            args = ([1, 1], [0, 0], [1, 1], groups, which)
            assert fastnn._C.conv2d_algorithm(x, weight, *args) == "gemm", (c, k, which)


def test_layers_of_few_pixels_are_products():
    """A strided layer of one small image: torch would copy its whole weight first."""
    args = ([2, 2], [1, 1], [1, 1], 1, "forward")
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, 256, 14, 14).contiguous(memory_format=format)
        assert fastnn._C.conv2d_algorithm(x, torch.randn(512, 256, 3, 3), *args) == "gemm"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strided_pointwise_layers(layout):
    """The shortcuts of residual networks, strides of 2 and 3, and the pixels that no output reads: zero gradients."""
    for n, c, size, k, stride in [(1, 16, 7, 40, 2), (3, 70, 15, 33, 3), (8, 32, 56, 64, 2), (2, 250, 50, 20, (1, 2))]:
        x = torch.randn(n, c, size, size).contiguous(memory_format=layout)
        inputs = [t.requires_grad_() for t in (x, torch.randn(k, c, 1, 1), torch.randn(k))]
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        y, expected = fastnn.functional.conv2d(*inputs, stride), torch_conv2d(*doubles, stride)
        g = torch.randn_like(y)
        ours = [y, *torch.autograd.grad(y, inputs, g)]
        theirs = [expected, *torch.autograd.grad(expected, doubles, g.double())]
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 * float(e.detach().abs().max()))
    x, weight = torch.randn(8, 64, 56, 56).contiguous(memory_format=layout), torch.randn(128, 64, 1, 1)
    for which in ("forward", "grad_input"):
        assert fastnn._C.conv2d_algorithm(x, weight, [2, 2], [0, 0], [1, 1], 1, which) == "gemm"


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pointwise_of_few_channels(isa, channels, groups, forced):
    """Sums of a few terms over whole planes: more than one run of columns, single vectors and what is left of one."""
    assert fastnn._C.set_isa(isa) and forced("gemm")
    for n, h, w, k in ((1, 4, 4, 1), (3, 5, 7, 9), (2, 33, 37, 6), (1, 40, 52, 4)):
        x, weight, bias = torch.randn(n, channels * groups, h, w), torch.randn(k * groups, channels, 1, 1), None
        for bias in (None, torch.randn(k * groups)):
            results = lambda: [fastnn.functional.conv2d(x, weight, bias, groups=groups)]  # noqa: B023, E731
            assert_same_bits_for_every_thread_count(results, (1, 2, 3))
            exact = torch_conv2d(x.double(), weight.double(), None if bias is None else bias.double(), groups=groups)
            assert (results()[0] - exact).abs().max() <= 2.0**-20 * exact.abs().max()


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize(
    "size",
    [(1, 2), (2, 1), (3, 2), (1, 5), (4, 4), (7, 3), (9, 1), (16, 2), (5, 16), (40, 3), (20, 3), (96, 8), (8, 17)],
    ids=str,
)
def test_small_pointwise_groups_of_nhwc_images(isa, size, forced):
    """Groups side by side in the lanes, and those of few results or channels: whole rows of vectors, what is left of
    one, and no group reads another's."""
    assert fastnn._C.set_isa(isa) and forced("gemm")
    c, k = size
    for n, h, w, groups in ((1, 1, 70, 3), (3, 9, 7, 4), (2, 33, 10, 5), (40, 1, 1, 16), (1, 13, 13, 17)):
        x = torch.randn(n, c * groups, h, w).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, bias = torch.randn(k * groups, c, 1, 1, requires_grad=True), torch.randn(k * groups)
        exact = torch_conv2d(x.double(), weight.double(), bias.double(), groups=groups)
        g = torch.randn(exact.shape).contiguous(memory_format=torch.channels_last)

        def results(x=x, weight=weight, bias=bias, groups=groups, g=g):
            y = fastnn.functional.conv2d(x, weight, bias, groups=groups)
            return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]

        assert_same_bits_for_every_thread_count(results, (1, 2, 3))
        for a, e in zip(results(), [exact, *torch.autograd.grad(exact, (x, weight), g.double())], strict=True):
            assert (a - e).abs().max() <= 2.0**-18 * e.abs().max()
        x = x.detach().clone()
        x[:, :c] = torch.inf
        y = fastnn.functional.conv2d(x, weight.detach(), bias, groups=groups)
        torch.testing.assert_close(y[:, k:], exact.detach()[:, k:].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 2), (4, 16), (16, 13)], ids=str)
@pytest.mark.parametrize(
    ("algorithm", "channels_last"),
    [*itertools.product(["gemm", "shift", "winograd"], [False, True]), ("batch", False)],
)
def test_small_groups_side_by_side(algorithm, size, channels_last, stride, forced):
    """Every thread takes whole groups: the same bits as one thread's, in all passes."""
    assert forced(algorithm)
    (c, k), groups = size, 12
    kernel = {"gemm": stride, "winograd": 3 * stride}.get(algorithm, 3)
    x, weight = torch.randn(16, c * groups, 9, 8), torch.randn(k * groups, c, kernel, kernel)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    inputs = [t.requires_grad_() for t in (x, weight, torch.randn(k * groups))]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch_conv2d(*doubles, stride, groups=groups)
    assert fastnn._C.conv2d_algorithm(x, weight, [stride] * 2, [0, 0], [1, 1], groups, "forward") == algorithm
    g = torch.randn(exact.shape)

    def results():
        y = fastnn.functional.conv2d(*inputs, stride, groups=groups)
        return [y.detach(), *torch.autograd.grad(y, inputs, g)]

    assert_same_bits_for_every_thread_count(results, (1, 2, 3, 6, 90))
    for a, e in zip(results(), [exact, *torch.autograd.grad(exact, doubles, g.double())], strict=True):
        torch.testing.assert_close(a.double(), e.detach(), rtol=1e-5, atol=1e-5 * float(e.detach().abs().max()))


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_gradient_of_one_pixel_by_its_strides(isa, forced):
    """sum() hands back an expanded gradient: one element whose strides are 0."""
    assert fastnn._C.set_isa(isa) and forced("gemm")
    x, weight = torch.randn(1, 1, 3, 3, requires_grad=True), torch.randn(1, 1, 3, 3)
    (grad,) = torch.autograd.grad(fastnn.functional.conv2d(x, weight).sum(), x)
    torch.testing.assert_close(grad, weight)


@pytest.mark.parametrize(
    ("isa", "layout"),
    [(isa, layout) for isa in fastnn._C.isas() for layout in LAYOUTS if isa != "baseline" or layout != LAYOUTS[0]],
)
def test_depthwise_weight_gradient_sees_no_pixel_of_another_window(isa, layout, forced):
    """grad_weight[r][s] is finite where tap (r, s) never meets the one infinite pixel, in the last column."""
    assert fastnn._C.set_isa(isa) and forced("depthwise")
    for size in (7, 14, 20, 40):
        x = torch.zeros(1, 18, size, size).contiguous(memory_format=layout)
        x[0, 0, size // 2, -1] = float("inf")
        weight = torch.zeros(18, 1, 3, 3, requires_grad=True)
        y = fastnn.functional.conv2d(x, weight, None, 1, 1, groups=18)
        (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
        assert (
            torch.isfinite(grad[0, 0, :, 0]).all()
            and torch.isinf(grad[0, 0, :, 1:]).all()
            and torch.isfinite(grad[1:]).all()
        )


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_channels_last_that_leaves_the_caches(isa, stride, forced):
    """Three images large enough to be fetched ahead, of two vectors of channels and a part."""
    assert fastnn._C.set_isa(isa) and forced("depthwise")
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(3, 40, 111, 107, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(40, 1, 3, 3, generator=generator), torch.randn(40, generator=generator)
    assert_plain_sums(generator, [t.requires_grad_() for t in (x, weight, bias)], stride, 1, 1, 40)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_channels_last_has_the_same_bits_for_every_thread_count(stride, forced):
    assert forced("depthwise")
    x = torch.randn(2, 72, 33, 31).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(72, 1, 3, 3, requires_grad=True), torch.randn(72, requires_grad=True)

    def step():
        y = fastnn.functional.conv2d(x, weight, bias, stride, 1, groups=72)
        return [y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))]

    assert_same_bits_for_every_thread_count(step)


@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_images_of_one_pixel(kernel, forced):
    """Channels lie together and every stride of a column is 1: what lies where, only the strides' reader decides."""
    assert forced("depthwise")
    generator = torch.Generator().manual_seed(7)
    for n, c in ((1, 3), (3, 16), (20, 37)):
        inputs = [
            torch.randn(size, generator=generator, requires_grad=True)
            for size in ((n, c, 1, 1), (c, 1, kernel, kernel), (c,))
        ]
        assert_plain_sums(generator, inputs, 1, kernel // 2, 1, c)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_kernels_of_every_size(layout):
    """1x1 to 17x17, square or not (Inception's 1x7 and 7x1): there is a choice for each, and the sums are right."""
    generator = torch.Generator().manual_seed(9)
    names = {"reference", "shift", "winograd", "depthwise", "gemm", "batch", "batch_winograd", "aten"}
    for r, s in itertools.product(range(1, 18), repeat=2):
        padding = [r // 2, s // 2]
        for n, c, k, groups in ((1, 16, 32, 1), (16, 16, 16, 1), (2, 32, 48, 2), (1, 3, 5, 1), (2, 6, 6, 6)):
            x = torch.randn(n, c, 18, 20, generator=generator).contiguous(memory_format=layout)
            weight = torch.randn(k, c // groups, r, s, generator=generator)
            for stride, dilation in ((1, 1), (2, 1), (4, 1), (1, 2), (3, 2)):
                if max(r, s) * dilation > 18:
                    continue
                for which in ("forward", "grad_input", "grad_weight"):
                    args = ([stride] * 2, padding, [dilation] * 2, groups, which)
                    assert fastnn._C.conv2d_algorithm(x, weight, *args) in names
        if r in (1, 2, 3, 6, 7, 8, 13) and s in (1, 3, 7, 8, 11):
            inputs = [torch.randn(2, 16, 18, 20).contiguous(memory_format=layout), torch.randn(18, 16, r, s)]
            inputs = [t.requires_grad_() for t in (*inputs, torch.randn(18))]
            with fastnn.set_strict_conv(True):
                assert_plain_sums(generator, inputs, 1, padding)


@pytest.mark.parametrize("seed", range(4))
def test_random_layers_as_they_are_chosen(seed):
    """Any kernel, stride, dilation, padding, group and layout, by the algorithm of its choice, and frozen."""
    generator = torch.Generator().manual_seed(seed)
    pick, number = choose_from(generator), numbers_from(generator)
    for i in range(100):
        groups, kernel = pick(1, 1, 1, 1, 2, 3, 8), [pick(1, 2, 3, 3, 4, 5, 6, 7, 9, 11) for _ in range(2)]
        kernel = kernel if i % 2 else kernel[:1] * 2
        c, k = groups * pick(1, 2, 3, 4, 5, 8, 16, 17, 24), groups * pick(1, 2, 3, 4, 7, 8, 16, 20, 33)
        if i % 10 == 0:
            c = k = groups  # depthwise
        stride, dilation = [pick(1, 1, 1, 2, 2, 3, 4) for _ in range(2)], [pick(1, 1, 1, 2, 3) for _ in range(2)]
        reach = [d * (r - 1) for d, r in zip(dilation, kernel, strict=True)]
        padding = [number(0, r) for r in reach]
        size = [max(1, r + 1 - 2 * p) + number(0, 24) for r, p in zip(reach, padding, strict=True)]
        layouts = [pick(*LAYOUTS) for _ in range(2)]
        x = torch.randn(pick(1, 1, 2, 5, 16), c, *size, generator=generator).contiguous(memory_format=layouts[0])
        weight = torch.randn(k, c // groups, *kernel, generator=generator).contiguous(memory_format=layouts[1])
        inputs = [x, weight, torch.randn(k, generator=generator)]
        geometry = (stride, padding, dilation, groups)
        shape = torch_conv2d(*inputs, *geometry).shape
        g = torch.randn(shape, generator=generator)

        def run(function, change, inputs=inputs, g=g, geometry=geometry):
            inputs = [change(t.detach()).requires_grad_() for t in inputs]
            y = function(*inputs, *geometry)
            return [y, *torch.autograd.grad(y, inputs, change(g))]

        ours = run(fastnn.functional.conv2d, torch.clone)
        exact, scales = run(torch_conv2d, torch.Tensor.double), run(torch_conv2d, lambda t: t.double().abs())
        for a, e, scale in zip(ours, exact, scales, strict=True):
            assert (a - e).abs().max() <= 2**-17 * scale.max(), (x.shape, weight.shape, geometry, layouts)
        if i % 4 == 0:
            layer = torch.nn.Conv2d(c, k, kernel, *geometry)
            layer.weight.data, layer.bias.data = weight, inputs[2]
            frozen = fastnn.fuse(torch.nn.Sequential(layer, torch.nn.ReLU()).eval())
            with torch.no_grad():
                error = (frozen(x) - exact[0].relu()).abs().max()
            assert error <= 2**-17 * scales[0].max(), (x.shape, weight.shape, geometry, layouts)


def test_unknown_algorithm_is_refused(forced):
    assert not forced("wavelet")


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_batch_in_lanes_on_random_shapes(isa, forced):
    """Strides, padding, dilation, both layouts, partial lane groups and several bands, against float64."""
    assert fastnn._C.set_isa(isa) and forced("batch")
    generator = torch.Generator().manual_seed(4)
    pick = numbers_from(generator)
    taken = 0
    for i in range(60):
        n, c, k, groups = pick(12, 40), pick(1, 12), pick(1, 20), 1
        if i % 7 == 0:
            groups, c, k = 2, 2 * c, 2 * k
        if i % 10 == 0:
            c, k = 24 * groups, 40 * groups
        kernel, stride = (pick(1, 5), pick(1, 5)), (pick(1, 3), pick(1, 3))
        padding, dilation = (pick(0, 3), pick(0, 3)), (pick(1, 2), pick(1, 2))
        size = [pick(dilation[j] * (kernel[j] - 1) + 1, 22) for j in range(2)]
        format = torch.channels_last if i % 3 == 0 else torch.contiguous_format
        x = torch.randn(n, c, *size, generator=generator).contiguous(memory_format=format).requires_grad_()
        weight = torch.randn(k, c // groups, *kernel, generator=generator).requires_grad_()
        bias = torch.randn(k, generator=generator).requires_grad_()
        passes = ("forward", "grad_input", "grad_weight")
        taken += sum(
            fastnn._C.conv2d_algorithm(x, weight, stride, padding, dilation, groups, p) == "batch" for p in passes
        )
        y = fastnn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        g = torch.randn(y.shape, generator=generator).contiguous(memory_format=format)
        ours = [y, *torch.autograd.grad(y, (x, weight, bias), g)]
        inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        exact = torch_conv2d(*inputs, stride, padding, dilation, groups)
        exact = [exact, *torch.autograd.grad(exact, inputs, g.double())]
        for a, b in zip(ours, exact, strict=True):
            assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max()), (
                n,
                c,
                k,
                size,
                kernel,
                stride,
                padding,
                dilation,
                groups,
            )
    assert taken >= 120


@pytest.mark.parametrize(
    "shape",
    [
        (3, 70, 15, 14, 67, 3, 1, 1),
        (1, 100, 9, 9, 120, 3, 1, 1),
        (40, 5, 13, 12, 9, 3, 2, 1),
        (2, 40, 12, 12, 70, 5, 1, 1),
        (2, 5, 40, 30, 33, 5, 2, 1),
        (2, 48, 21, 21, 48, 3, 1, 48),
        (1, 150, 14, 14, 61, 3, 2, 1),
    ],
)
@pytest.mark.parametrize("algorithm", ["shift", "winograd", "depthwise", "gemm", "batch", ""])
def test_same_bits_for_every_thread_count(shape, algorithm, forced):
    n, c, h, w, k, r, stride, groups = shape
    assert forced(algorithm)
    x, weight = torch.randn(n, c, h, w, requires_grad=True), torch.randn(k, c // groups, r, r, requires_grad=True)

    def step():
        y = fastnn.functional.conv2d(x, weight, stride=stride, padding=1, groups=groups)
        return [y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))]

    assert_same_bits_for_every_thread_count(step)
