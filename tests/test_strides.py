"""Results lie in memory as torch's do, also where dimensions of size 1 have strides of their own; fake ones too."""

import itertools

import pytest
import torch
from cases import ALL, T
from torch._subclasses.fake_tensor import FakeTensorMode


def in_order(t, order, odd=None):
    """A copy of `t` whose dimensions lie in memory in `order`; those of size 1 have stride `odd` if given."""
    strides, step = [0] * t.dim(), 1
    for d in reversed(order):
        strides[d] = odd if odd is not None and t.size(d) == 1 else step
        step *= t.size(d)
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


def views(t):
    """`t` and its parts with dimensions of size 1, in every order in memory, dense, with gaps and expanded."""
    parts = [t, t[:1], t[..., :1], t[:, :1], t[:, :, :1, :1], t[:1, :, :1, :1]]
    for part, order in itertools.product(parts, itertools.permutations(range(4))):
        yield from (in_order(part, order, odd) for odd in ((None, 0, 1, 77) if 1 in part.shape else (None,)))
        yield in_order(torch.cat([part, part], -1), order)[..., ::2]
    yield t[:1].expand_as(t)
    yield t[..., :1].expand_as(t)


def calls(case):
    """The case with every view in place of its image, and convolutions with both formats of their weight."""
    args, kwargs = case.build(torch.float32)
    for x in views(args[0].detach()):
        yield (x, *args[1:]), kwargs
        if case.op == "conv2d":
            yield (x, args[1].contiguous(memory_format=torch.channels_last), *args[2:]), kwargs


def outcome(function, args, kwargs):
    """What torch.nn.functional or fastnn.functional gives, as a list; None where it refuses the sizes."""
    try:
        with torch.no_grad():
            y = function(*args, **kwargs)
    except (RuntimeError, ValueError):
        return None
    return list(y) if isinstance(y, tuple) else [y]


def fake_outcome(function, args, kwargs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        return outcome(function, fake, kwargs)


def spread(t):
    """Sizes and strides without the dimensions of size 1, whose strides are inexact in torch's fake tensors."""
    return [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n != 1]


# The first two of every layer's cases on whole images; their batch and plane are larger than 1.
LAYERS = {}
for _case in ALL:
    if _case.op not in ("matmul", "cross_entropy", "nll_loss") and isinstance(_case.args[0], T):
        if len(_case.args[0].shape) == 4 and min(_case.args[0].shape) > 1:
            LAYERS.setdefault(_case.op, []).append(_case)


@pytest.mark.parametrize("case", [case for cases in LAYERS.values() for case in cases[:2]], ids=lambda c: c.name)
def test_results_lie_as_torchs(case):
    for i, (args, kwargs) in enumerate(calls(case)):
        expected, got = outcome(case.reference, args, kwargs), outcome(case.fast, args, kwargs)
        what = f"input of sizes {tuple(args[0].shape)}, strides {args[0].stride()}"
        assert (got is None) == (expected is None), what
        if expected is None:
            continue
        assert [t.stride() for t in got] == [t.stride() for t in expected], what
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, expected, strict=True)), what
        if i % 29 == 0:
            fake = fake_outcome(case.fast, args, kwargs)
            assert list(map(spread, fake)) == list(map(spread, got)), f"fake result, {what}"


@pytest.mark.parametrize("case", [case for cases in LAYERS.values() for case in cases[:1]], ids=lambda c: c.name)
def test_empty_batches_lie_as_torchs(case):
    assert_empty_batches_lie_as_torchs(case, *case.build(torch.float32))


def test_empty_batches_of_convolutions_that_keep_the_shape():
    """Alone among convolutions, torch's answers them in the layout of the input."""
    case = LAYERS["conv2d"][0]
    for groups in (1, 3):
        weight = torch.randn(6, 6 // groups, 3, 3)
        assert_empty_batches_lie_as_torchs(case, (torch.empty(1, 6, 5, 7), weight), {"padding": 1, "groups": groups})


def assert_empty_batches_lie_as_torchs(case, args, kwargs):
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty((0, *args[0].shape[1:]), memory_format=format, requires_grad=True)
        expected, got = case.reference(x, *args[1:], **kwargs), case.fast(x, *args[1:], **kwargs)
        assert got.stride() == expected.stride()
        gradients = [torch.autograd.grad(y, x, torch.ones_like(expected))[0].stride() for y in (got, expected)]
        assert gradients[0] == gradients[1]
        if case.op in ("batch_norm", "conv2d"):  # fake pointwise results of torch's are contiguous as well
            assert fake_outcome(case.fast, (x.detach(), *args[1:]), kwargs)[0].stride() == got.stride()
