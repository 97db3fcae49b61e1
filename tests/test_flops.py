"""FlopCounterMode and the profiler count fastnn's operators as torch's."""

import pytest
import torch
from cases import ALL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastnn


def flops(function, *inputs):
    """The floating-point operations of a call and of its backward, by torch's own counter."""
    leaves = [t for t in inputs if t.is_floating_point()]
    with FlopCounterMode(display=False) as forward:
        out = function(*inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), [t for t in leaves if t.requires_grad])
    return forward.get_total_flops(), backward.get_total_flops()


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


CALLS = {
    "linear": ("linear", (leaf(5, 6), leaf(7, 6), leaf(7))),
    "linear of 3-D": ("linear", (leaf(2, 5, 6), leaf(7, 6), leaf(7))),
    "linear of frozen input": ("linear", (torch.randn(5, 6), leaf(7, 6))),
    "mm": ("mm", (leaf(3, 4), leaf(4, 5))),
    "bmm": ("bmm", (leaf(2, 3, 4), leaf(2, 4, 5))),
    "matmul": ("matmul", (leaf(2, 3, 4), leaf(4, 5))),
    "matmul of batches": ("matmul", (leaf(2, 3, 4), leaf(2, 4, 5))),
    "addmm": ("addmm", (leaf(5), leaf(3, 4), leaf(4, 5))),
    "conv2d": ("conv2d", (leaf(2, 3, 9, 8), leaf(6, 3, 3, 2), leaf(6))),
    "conv2d unbatched": ("conv2d", (leaf(3, 9, 8), leaf(6, 3, 3, 2))),
    "conv2d of frozen input": ("conv2d", (torch.randn(2, 3, 9, 8), leaf(6, 3, 3, 2), leaf(6))),
}


@pytest.mark.parametrize("name,inputs", CALLS.values(), ids=CALLS)
def test_counts_are_torchs(name, inputs):
    theirs = flops(getattr(nn.functional, name, None) or getattr(torch, name), *inputs)
    assert flops(getattr(fastnn.functional, name), *inputs) == theirs
    assert all(theirs)


def test_a_grouped_strided_convolution():
    theirs = nn.Conv2d(6, 12, 3, stride=2, padding=1, dilation=2, groups=3)
    ours = fastnn.convert(theirs, inplace=False)
    x = leaf(2, 6, 17, 15)
    assert flops(ours, x) == flops(theirs, x)


def test_modules_by_name():
    model = fastnn.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 8, 8)).sum().backward()
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    conv, linear = 2 * 4 * 8 * 36 * 27, 2 * 4 * 8 * 36 * 10
    assert counts["Sequential.0"] == 2 * conv  # forward and weight: nobody asks for the image's gradient
    assert counts["Sequential.3"] == 3 * linear


def test_every_case_has_a_name_in_the_profiler():
    """A profile of any native case names the fastnn op that ran."""
    cases = {c.name.split("[")[0]: c for c in ALL if not c.tags & {"big", "aten"}}
    assert len(cases) > 15
    for name, case in cases.items():
        args, kwargs = case.build(torch.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            case.fast(*args, **kwargs)
        assert any(e.key.startswith("fastnn::") for e in profile.key_averages()), name
