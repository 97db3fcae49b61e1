"""Winograd's convolutions: the bound on their error, the layers they are chosen for, strict mode."""

import pytest
import torch
from compare import assert_same_bits_for_every_thread_count
from picks import numbers_from
from torch.nn.functional import conv2d as torch_conv2d

import fastnn


@pytest.mark.parametrize(("kernel", "shapes"), [(2, 50), (3, 200), (4, 50), (5, 100)])
@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_winograd_bound_on_random_shapes(isa, dilated, kernel, shapes, forced):
    """|error| <= 2**-17 * max(conv(|x|, |w|)) for the output and, with their own factors, both gradients."""
    assert fastnn._C.set_isa(isa) and forced("winograd")
    generator = torch.Generator().manual_seed(3)
    pick = numbers_from(generator)
    for i in range(shapes):
        least = 12 if kernel == 2 else 1
        n, c, k = pick(1, 3), pick(least, 40), pick(least, 40)
        if i % 10 == 0:  # a weight large enough for the order of work that serves few tiles
            n, c, k = 1, pick(90, 130), pick(90, 130)
        dilation = [pick(1, 4), pick(1, 5)] if dilated else [1, 1]
        reach = [d * (kernel - 1) for d in dilation]
        h, w, padding = *(pick(r + 1, r + 18) for r in reach), [pick(0, r) for r in reach]
        format = torch.channels_last if i % 3 == 0 else torch.contiguous_format
        x = torch.randn(n, c, h, w, generator=generator).contiguous(memory_format=format).requires_grad_()
        weight = torch.randn(k, c, kernel, kernel, generator=generator)
        if i % 4 == 0:
            weight = weight.contiguous(memory_format=torch.channels_last)
        weight.requires_grad_()
        bias = torch.randn(k, generator=generator).requires_grad_()
        args = ([1, 1], padding, dilation, 1)
        for which in ("forward", "grad_input", "grad_weight"):
            assert fastnn._C.conv2d_algorithm(x, weight, *args, which) == "winograd"
        y = fastnn.functional.conv2d(x, weight, bias, 1, padding, dilation)
        g = torch.randn(y.shape, generator=generator)
        ours = [y, *torch.autograd.grad(y, (x, weight, bias), g)]

        def exact(x, weight, bias, g, padding=padding, dilation=dilation):
            x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
            y = torch_conv2d(x, weight, bias, 1, padding, dilation)
            return [y, *torch.autograd.grad(y, (x, weight, bias), g.double())]

        results = exact(x, weight, bias, g)
        scales = exact(x.abs(), weight.abs(), bias.abs(), g.abs())
        for a, b, s in zip(ours, results, scales, strict=True):
            assert (a - b).abs().max() <= 2**-17 * s.abs().max(), (kernel, n, c, k, h, w, padding, dilation)


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_batch_winograd_bound_on_random_shapes(isa, forced):
    """The same bound with an image per lane: both layouts, partial lane groups, tiles cut off, several bands, tiles of
    outputs and, where the gradient of the output has fewer, of that."""
    assert fastnn._C.set_isa(isa) and forced("batch_winograd")
    generator = torch.Generator().manual_seed(7)
    pick = numbers_from(generator)
    for i in range(100):
        kernel = pick(1, 2) * 2 + 1
        n, c, k = pick(12, 40), pick(1, 14), pick(1, 20)
        if i % 10 == 0:
            c, k = pick(30, 50), pick(30, 50)
        h, w, padding = pick(kernel, 20), pick(kernel, 20), (pick(0, kernel - 1), pick(0, kernel - 1))
        format = torch.channels_last if i % 3 == 0 else torch.contiguous_format
        x = torch.randn(n, c, h, w, generator=generator).contiguous(memory_format=format).requires_grad_()
        weight = torch.randn(k, c, kernel, kernel, generator=generator)
        weight = (weight.contiguous(memory_format=torch.channels_last) if i % 4 == 0 else weight).requires_grad_()
        bias = torch.randn(k, generator=generator).requires_grad_()
        args = ([1, 1], list(padding), [1, 1], 1)
        if i % 3:
            passes = ("forward", "grad_input", "grad_weight")[: kernel // 2 + 1]
            assert {fastnn._C.conv2d_algorithm(x, weight, *args, p) for p in passes} == {"batch_winograd"}

        def results(x=x, weight=weight, bias=bias, padding=padding, g=None, conv2d=fastnn.functional.conv2d):
            y = conv2d(x, weight, bias, padding=padding)
            g = torch.ones_like(y) if g is None else g
            return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), g)]

        def exact(x, weight, bias, g, padding=padding, results=results):
            inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
            return results(*inputs, padding, g.double(), torch_conv2d)

        g = torch.randn(results()[0].shape, generator=generator).contiguous(memory_format=format)
        scales = exact(x.abs(), weight.abs(), bias.abs(), g.abs())
        for a, b, s in zip(results(g=g), exact(x, weight, bias, g), scales, strict=True):
            assert (a - b).abs().max() <= 2**-17 * s.abs().max(), (kernel, n, c, k, h, w, padding)
        if i % 5 == 0:
            assert_same_bits_for_every_thread_count(results, (1, 2, 3, 9))


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_winograd_bound_of_strided_layers(isa, forced):
    """The same bound where the phases of a stride are channels: kernels that the stride divides and others, both ways
    a weight can lie, images that end within a phase."""
    assert fastnn._C.set_isa(isa) and forced("winograd")
    generator = torch.Generator().manual_seed(6)
    pick = numbers_from(generator)
    for i in range(120):
        stride, taps = (4, pick(2, 4)) if i % 4 == 0 else (2, pick(2, 5))
        kernel = [pick((taps - 1) * stride + 1, min(16, taps * stride)) for _ in range(2)]
        if i % 3 == 0:  # the gradient of the input too
            kernel = [stride * taps] * 2
        padding = [pick(0, r - 1 if i % 2 else r // 2) for r in kernel]
        n, k, c = pick(1, 3), pick(12, 40), pick(3, 6) if i % 3 else 16 * pick(1, 2)
        size = [pick(max(1, r - 2 * p), 45) for r, p in zip(kernel, padding, strict=True)]
        x, weight = torch.randn(n, c, *size, generator=generator), torch.randn(k, c, *kernel, generator=generator)
        x = x.contiguous(memory_format=torch.channels_last) if pick(0, 1) else x
        weight = weight.contiguous(memory_format=torch.channels_last) if pick(0, 1) else weight
        if i % 10 == 0:  # a weight large enough for the order of work that serves few tiles
            n, size = 1, [2 * r for r in kernel]
            x, weight = (
                torch.randn(n, 64, *size, generator=generator),
                torch.randn(96, 64, *kernel, generator=generator),
            )
        bias = torch.randn(len(weight), generator=generator)
        args = ([stride] * 2, padding, [1, 1], 1)
        for which in ("forward", "grad_weight", *(["grad_input"] if i % 3 == 0 else [])):
            assert fastnn._C.conv2d_algorithm(x, weight, *args, which) == "winograd"

        def run(function, dtype, sign, x=x, weight=weight, bias=bias, stride=stride, padding=padding, i=i):
            x, weight, bias = (t.to(dtype) if sign else t.to(dtype).abs() for t in (x, weight, bias))
            inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
            y = function(*inputs, stride, padding)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
            return [y, *torch.autograd.grad(y, inputs, g if sign else g.abs())]

        ours = run(fastnn.functional.conv2d, torch.float32, True)
        exact, scales = (run(torch_conv2d, torch.float64, sign) for sign in (True, False))
        for a, e, scale in zip(ours, exact, scales, strict=True):
            assert (a - e).abs().max() <= 2**-17 * scale.max(), (n, c, k, size, kernel, stride, padding)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_discriminators_run_by_winograd(layout):
    """4x4/2 and 4x4 layers, every pass."""
    for c, size, k, stride in ((64, 64, 128, 2), (64, 30, 64, 1)):
        x, weight = torch.randn(4, c, size, size).contiguous(memory_format=layout), torch.randn(k, c, 4, 4)
        for which in ("forward", "grad_input", *(["grad_weight"] if stride == 1 else [])):
            assert fastnn._C.conv2d_algorithm(x, weight, [stride] * 2, [1, 1], [1, 1], 1, which) == "winograd"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dilated_layers_run_by_winograd(layout):
    """Every second or fourth pixel, every pass, with the same bits for every number of threads; but neither in strict
    mode nor where a kernel is as wide as the image."""
    for size, dilation, winograd in ((28, 2, True), (28, 4, True), (14, 2, True), (14, 12, False)):
        x = torch.randn(2, 48, size, size).contiguous(memory_format=layout).requires_grad_()
        weight = torch.randn(64, 48, 3, 3, requires_grad=True)
        for which in ("forward", "grad_input", "grad_weight"):
            args = (x, weight, [1, 1], [dilation] * 2, [dilation] * 2, 1, which)
            assert (fastnn._C.conv2d_algorithm(*args) == "winograd") == winograd
            with fastnn.set_strict_conv(True):
                assert fastnn._C.conv2d_algorithm(*args) != "winograd"

        def step(x=x, weight=weight, dilation=dilation):
            y = fastnn.functional.conv2d(x, weight, None, 1, dilation, dilation)
            return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

        assert_same_bits_for_every_thread_count(step)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_first_layers_run_by_winograd(layout):
    """AlexNet's 11x11/4 and ResNet's 7x7/2, but not in strict mode; a stride of 3 or unequal strides never."""
    for kernel, stride in ((11, 4), (7, 2), (5, 2)):
        x, weight = torch.randn(1, 3, 64, 64).contiguous(memory_format=layout), torch.randn(64, 3, kernel, kernel)
        weight.requires_grad_()
        for which in ("forward", "grad_weight"):
            args = ([kernel // 2] * 2, [1, 1], 1, which)
            assert fastnn._C.conv2d_algorithm(x, weight, [stride] * 2, *args) == "winograd"
            assert fastnn._C.conv2d_algorithm(x, weight, [3, 3], *args) != "winograd"
            assert fastnn._C.conv2d_algorithm(x, weight, [stride, 1], *args) != "winograd"
            with fastnn.set_strict_conv(True):
                assert fastnn._C.conv2d_algorithm(x, weight, [stride] * 2, *args) != "winograd"

        def step(x=x, weight=weight, stride=stride):
            y = fastnn.functional.conv2d(x, weight, None, stride, weight.shape[2] // 2)
            return [y, *torch.autograd.grad(y.square().sum(), weight)]

        assert_same_bits_for_every_thread_count(step)


def test_strict_mode_never_chooses_winograd():
    x, w = torch.randn(1, 64, 40, 40), torch.randn(64, 64, 3, 3)
    args = (x, w, [1, 1], [1, 1], [1, 1], 1)
    passes = ("forward", "grad_input", "grad_weight")
    assert {fastnn._C.conv2d_algorithm(*args, p) for p in passes} == {"winograd"}
    with fastnn.set_strict_conv(True):
        assert "winograd" not in {fastnn._C.conv2d_algorithm(*args, p) for p in passes}
    assert fastnn._C.conv2d_algorithm(*args, "forward") == "winograd"
    x, w = torch.randn(64, 10, 12, 12), torch.randn(20, 10, 5, 5)
    args = (x, w, [1, 1], [0, 0], [1, 1], 1)
    assert {fastnn._C.conv2d_algorithm(*args, p) for p in passes} == {"batch_winograd"}
    with fastnn.set_strict_conv(True):
        assert {fastnn._C.conv2d_algorithm(*args, p) for p in passes} == {"batch"}
