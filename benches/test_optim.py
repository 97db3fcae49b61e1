"""Optimizer steps and gradient clipping, from the MNIST CNN to 20 M parameters."""

import pytest
import torch
from optim_models import HAS_FUSED, MODELS, OPTIMIZERS, check, parameters

import fastnn


@pytest.fixture(params=["fastnn", "torch", "torch fused"])
def library(request):
    return request.param


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark, model, name, library):
    options, _ = OPTIMIZERS[name]
    if library == "torch fused":
        if name not in HAS_FUSED:
            pytest.skip("torch has no fused form")
        options = {**options, "fused": True}
    benchmark.group = f"{name} {model}"
    check(
        getattr(fastnn.optim, name)(parameters(model), lr=1e-3, **options),
        getattr(torch.optim, name)(parameters(model), lr=1e-3, **options),
    )
    module = fastnn.optim if library == "fastnn" else torch.optim
    optimizer = getattr(module, name)(parameters(model), lr=1e-3, **options)
    benchmark(optimizer.step)


@pytest.mark.parametrize("library", ["fastnn", "torch"])
@pytest.mark.parametrize("model", MODELS)
def test_clip_grad_norm(benchmark, model, library):
    benchmark.group = f"clip_grad_norm_ {model}"
    ours, torchs = parameters(model), parameters(model)
    torch.testing.assert_close(fastnn.clip_grad_norm_(ours, 1.0), torch.nn.utils.clip_grad_norm_(torchs, 1.0))
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    function = fastnn.clip_grad_norm_ if library == "fastnn" else torch.nn.utils.clip_grad_norm_
    benchmark(function, ours, 1e-3)
