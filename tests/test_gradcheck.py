"""First and second derivatives of every case by finite differences in float64, and what they are functions of."""

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


def gradients_and_theirs(function, case, v_grad):
    """Which gradients made with create_graph require one, and the gradients of those."""
    args, kwargs = case.build(torch.float64)
    out = function(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    inputs, v = differentiable(args, kwargs), torch.ones_like(out, requires_grad=v_grad)
    once = torch.autograd.grad(out, inputs, v, create_graph=True, allow_unused=True)
    live = [g for g in once if g is not None and g.requires_grad]
    sources = [*inputs, *([v] if v_grad else [])]
    twice = [torch.autograd.grad(g.square().sum(), sources, allow_unused=True, retain_graph=True) for g in live]
    return [g is not None and g.requires_grad for g in once], [t for row in twice for t in row]


@pytest.mark.parametrize("v_grad", [False, True], ids=["constant", "variable"])
@pytest.mark.parametrize("case", [c for c in SMALL if differentiable(*c.build(torch.float64))], ids=lambda c: c.name)
def test_gradients_require_gradients_as_torchs_do(case, v_grad):
    """A derivative of zero is zero wherever torch's is, not an error."""
    ours, theirs = (gradients_and_theirs(f, case, v_grad) for f in (case.fast, case.reference))
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1], theirs[1], strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, equal_nan=True)
