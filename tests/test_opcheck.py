"""torch.library.opcheck on every fastnn op that any case reaches, forward and backward."""

import pytest
import torch
from cases import ALL
from compare import run
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = [c for c in ALL if "big" not in c.tags]


class Recorder(TorchDispatchMode):
    """Keeps every call of a fastnn op that passes the dispatcher."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastnn":
            self.calls.append((func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def recorded(case, layout="contiguous"):
    """The fastnn calls of a training step, and those of inference where they are others."""
    with Recorder() as recorder:
        run(case.fast, case, torch.float32, layout)
        seen = {func for func, _, _ in recorder.calls}
        args, kwargs = case.build(torch.float32, layout=layout)
        training = len(recorder.calls)
        with torch.no_grad():
            case.fast(*args, **kwargs)
    return recorder.calls[:training] + [c for c in recorder.calls[training:] if c[0] not in seen]


def fresh(value):
    """A leaf copy that wants a gradient where autograd allows one."""
    if isinstance(value, torch.Tensor):
        value = value.detach().clone()
        return value.requires_grad_() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(v) for v in value)
    return value


# Floating arguments torch refuses to differentiate.
CONSTANTS = {"fastnn::cross_entropy": {"weight"}, "fastnn::nll_loss": {"weight"}}


def mutable_arguments(func):
    return {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}


def fresh_call(func, args, kwargs):
    """The call's arguments as leaves; what the op writes to gets no gradient, as in a training loop."""
    written = mutable_arguments(func)
    names = [a.name for a in func._schema.arguments]
    fixed = written | CONSTANTS.get(func.name(), set())
    args = [
        fresh(a) if n not in fixed else a.detach().clone() if isinstance(a, torch.Tensor) else a
        for n, a in zip(names, args, strict=False)
    ]
    return tuple(args), {k: fresh(v) for k, v in kwargs.items()}


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_opcheck(case):
    calls = recorded(case)
    assert calls, "the case reached no fastnn op"
    for func, args, kwargs in calls:
        torch.library.opcheck(func, *fresh_call(func, args, kwargs))


IMAGE_OPS = sorted({c.op for c in SMALL if c.has_4d})


@pytest.mark.parametrize("name", IMAGE_OPS)
def test_opcheck_in_channels_last(name):
    """Strides of fake results, and dynamic shapes, for the first calls of each op on channels_last tensors."""
    seen = []
    for case in (c for c in SMALL if c.op == name and c.has_4d):
        for func, args, kwargs in recorded(case, "channels_last"):
            if seen.count(func) < 2:
                seen.append(func)
                utils = "test_faketensor", "test_aot_dispatch_dynamic"
                torch.library.opcheck(func, *fresh_call(func, args, kwargs), test_utils=utils)
    assert seen


def test_every_op_is_reached():
    reached = {func.name() for case in ALL for func, _, _ in recorded(case)}
    # A composite is made of other ops and becomes those before any mode sees it.
    composite = "CompositeImplicitAutograd"
    declared = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastnn::") and not torch._C._dispatch_has_kernel_for_dispatch_key(name, composite)
    }
    assert declared - reached - TESTED_ELSEWHERE == set()


# Ops no functional reaches, and the file that tests them.
TESTED_ELSEWHERE = {
    *(
        f"fastnn::{name}_step_" for name in ("adam", "yogi", "sgd", "adagrad", "rmsprop", "adadelta")
    ),  # test_optim_usage.py
    "fastnn::grads_total_norm",
    "fastnn::scale_grads_",  # test_clip_grad.py
    *(f"fastnn::{name}" for name in ("relu_", "relu6_", "leaky_relu_", "silu_")),  # test_activation.py
}
