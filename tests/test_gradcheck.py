"""First and second derivatives of every case by finite differences in float64."""

import pytest
import torch
from cases import ALL, differentiable
from compare import DEVICES

SMALL = [c for c in ALL if "big" not in c.tags]
by_device = pytest.mark.parametrize("device", DEVICES)


def as_function(case, device):
    """The case as a function of its differentiable tensors alone, and those tensors."""
    args, kwargs = case.build(torch.float64, device)
    inputs = differentiable(args, kwargs)

    def function(*values):
        fresh = iter(values)

        def swap(v):
            if isinstance(v, torch.Tensor):
                return next(fresh) if v.requires_grad else v.clone()
            return v

        out = case.fast(*map(swap, args), **{k: swap(v) for k, v in kwargs.items()})
        return out[0] if isinstance(out, tuple) else out

    return function, inputs


@by_device
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_gradcheck(case, device):
    function, inputs = as_function(case, device)
    assert torch.autograd.gradcheck(function, inputs)


@by_device
@pytest.mark.parametrize("case", [c for c in SMALL if "nodiff2" not in c.tags], ids=lambda c: c.name)
def test_gradgradcheck(case, device):
    function, inputs = as_function(case, device)
    assert torch.autograd.gradgradcheck(function, inputs)
