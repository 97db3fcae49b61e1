"""Shared by the pytest-benchmark suites: one thread for the record, results checked before they are timed."""

import pytest
import torch

import fastnn


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["fastnn", "torch"])
def library(request):
    """The namespace whose functions are timed: fastnn.functional or torch's."""
    return request.param


def functional(library, op):
    if library == "fastnn":
        return getattr(fastnn.functional, op)
    return getattr(torch.nn.functional, op, None) or getattr(torch, op)


def check_then_time(benchmark, library, op, args, kwargs=None, backward=False, tolerance=1e-4):
    """Compares fastnn with torch on these arguments, then times `library`: forward, or forward and backward."""
    kwargs = kwargs or {}
    case = benchmark.name.replace(f"{library}-", "").replace(f"-{library}", "")
    benchmark.group = case  # fastnn and torch side by side
    inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]

    def call(which):
        function = functional(which, op)
        if not backward:
            with torch.no_grad():
                return [function(*args, **kwargs)]
        out = function(*args, **kwargs)
        return [out, *torch.autograd.grad(out, inputs, gradient[:1] and gradient[0])]

    gradient = []
    if backward:
        gradient = [torch.randn_like(functional("torch", op)(*args, **kwargs))]
    for ours, torchs in zip(call("fastnn"), call("torch"), strict=True):
        scale = torchs.abs().max().item() + 1e-30
        assert (ours - torchs).abs().max().item() <= tolerance * scale
    benchmark(call, library)
