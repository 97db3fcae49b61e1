"""Outputs and first gradients of every case, in every dtype and layout, against torch and against float64."""

import pytest
import torch
from cases import ALL
from compare import DEVICES, compare, run

import fastnn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
by_name = pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
by_device = pytest.mark.parametrize("device", DEVICES)


@by_device
@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(case, dtype, device):
    (outputs, _, _), _ = compare(case, dtype, device=device)
    assert all(o.is_contiguous() for o in outputs)
    # Nothing was handed to torch's kernels, unless the case is there to show that it is, or CUDA is said to want it.
    reasons = {reason for _, reason in fastnn.fallbacks() if not (device == "cuda" and "CUDA" in reason)}
    if "vendor" not in case.tags:
        assert bool(reasons) == ("aten" in case.tags)


@pytest.mark.parametrize("case", [c for c in ALL if c.has_4d], ids=lambda c: c.name)
@by_device
def test_channels_last(case, device):
    (outputs, _, _), (expected, _, _) = compare(case, torch.float32, "channels_last", device)
    for o, e in zip(outputs, expected, strict=True):
        for format in (torch.contiguous_format, torch.channels_last) if o.numel() else ():
            assert o.is_contiguous(memory_format=format) == e.is_contiguous(memory_format=format)


@by_device
@by_name
def test_strided_inputs(case, device):
    compare(case, torch.float32, "strided", device)


@by_device
@by_name
def test_stride_zero_gradient(case, device):
    args, kwargs = case.build(torch.float64, device)
    inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]

    def gradients(function):
        out = function(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out.sum(), inputs, allow_unused=True)

    if inputs:
        for ours, torchs in zip(gradients(case.fast), gradients(case.reference), strict=True):
            torch.testing.assert_close(ours, torchs)


@by_device
@by_name
def test_same_bits_twice(case, device):
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # where cuDNN does the work
        first, second = (run(case.fast, case, torch.float32, device=device) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert a is b is None or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@by_device
@by_name
def test_no_grad_gives_the_same_output(case, device):
    with_grad, _, _ = run(case.fast, case, torch.float32, device=device)
    args, kwargs = case.build(torch.float32, device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = case.fast(*args, **kwargs)
        out = list(out) if isinstance(out, tuple) else [out]
        args, kwargs = case.build(torch.float32, device)
        for a, b in zip(out, with_grad, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.detach().nan_to_num(7.0))
