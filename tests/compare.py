"""How a case's outputs and gradients are compared with torch's."""

import torch
from cases import differentiable, tensors

import fastnn
from fastnn import _build

# Tests that name a device run once per entry: on CUDA too where this build has CUDA kernels and a GPU is present.
DEVICES = ["cpu", *(["cuda"] if _build.CUDA and torch.cuda.is_available() else [])]

# Floor of the allowed error, in units of the dtype's epsilon times the largest reference value.
FLOOR_ULPS = 4
# The same for float64, where the reference is itself rounded: both sums of a long reduction are off.
FLOOR_ULPS_FLOAT64 = 64


def run(function, case, dtype, layout="contiguous", upcast=False, device="cpu"):
    """Calls `function` on the case's arguments and backpropagates a fixed random gradient.

    Returns (outputs, gradients, arguments): outputs as a list of tensors, gradients of every differentiable argument,
    and the arguments after the call (batch_norm changes its running statistics). With `upcast` the arguments are
    rounded to `dtype` first and then computed in float64.
    """
    args, kwargs = case.build(dtype, device, layout)
    if upcast:

        def up(v):
            if isinstance(v, torch.Tensor) and v.is_floating_point():
                return v.detach().double().requires_grad_(v.requires_grad)
            return v

        args, kwargs = tuple(map(up, args)), {k: up(v) for k, v in kwargs.items()}
        if kwargs.get("dtype") is not None:
            kwargs["dtype"] = torch.float64
    out = function(*args, **kwargs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    inputs = differentiable(args, kwargs)
    gradients = []
    if inputs:
        first = outputs[0]
        generator = torch.Generator().manual_seed(7)
        seed = torch.randn(first.shape, generator=generator, dtype=torch.float64)
        seed = seed.to(dtype).to(first.dtype).to(first.device)
        gradients = torch.autograd.grad(first, inputs, seed, allow_unused=True)
    return outputs, gradients, tensors(args, kwargs)


def assert_close(ours, torchs, exact, dtype, what):
    """Our error against the float64 result is at most twice torch's own, above a floor of a few rounding steps."""
    assert (ours is None) == (torchs is None), what
    if ours is None:
        return
    assert ours.shape == torchs.shape and ours.dtype == torchs.dtype, f"{what}: {ours.shape} {ours.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, torchs), what
        return
    if exact.numel() == 0:
        return
    exact = exact.double()
    finite = exact.isfinite()
    assert torch.equal(ours.double()[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)), f"{what}: inf or nan"
    if not finite.any():
        return
    error = (ours.double() - exact)[finite].abs().max().item()
    allowed = (torchs.double() - exact)[finite].abs().nan_to_num(0).max().item()
    ulps = FLOOR_ULPS_FLOAT64 if ours.dtype == torch.float64 else FLOOR_ULPS
    floor = ulps * torch.finfo(ours.dtype).eps * max(1e-3, exact[finite].abs().max().item())
    assert error <= 2 * allowed + floor, f"{what}: error {error:.3g}, torch's {allowed:.3g}, floor {floor:.3g}"


def assert_same_bits_for_every_thread_count(function, counts=(1, 2, 3)):
    """function() gives the same tensors, bit by bit, for each number of threads; conftest.py restores the number."""
    results = []
    for n in counts:
        torch.set_num_threads(n)
        results.append(function())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def compare(case, dtype, layout="contiguous", device="cpu"):
    """Runs a case on fastnn, on torch, and on torch in float64, and compares outputs, gradients and arguments.

    Convolutions run in strict mode here; test_conv2d_winograd.py holds Winograd to its own bound.
    """
    with fastnn.set_strict_conv(True):
        ours = run(case.fast, case, dtype, layout, device=device)
    torchs = run(case.reference, case, dtype, layout, device=device)
    exact = run(case.reference, case, dtype, layout, upcast=True, device=device)
    for part, a, b, c in zip(("output", "gradient", "argument"), ours, torchs, exact, strict=True):
        for i, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            assert_close(x, y, z, dtype, f"{case.name} {part} {i}")
    return ours, torchs
