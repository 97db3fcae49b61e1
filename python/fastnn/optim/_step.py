"""The step every optimizer shares: closure, one call into C++, torch's own step for what the kernels do not take."""

import torch

from fastnn import _C


def torch_step(base, optimizer, closure=None):
    """base.step without the profiling and hooks around it: those already run around our own step."""
    step = base.step
    return getattr(step, "__wrapped__", step)(optimizer, closure) if hasattr(step, "hooked") else step(optimizer, closure)


def run(optimizer, closure, base, lists, native):
    """One step of `optimizer`, a subclass of torch's `base`.

    Args:
        closure: as torch.optim's step takes it, or None.
        lists: how many lists base._init_group fills, which creates missing state exactly as torch does.
        native: the entry point in C++. It returns None when it made the step; otherwise it changed nothing and
            returns the reason.
    """
    if torch.compiler.is_compiling():
        return torch_step(base, optimizer, closure)
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if type(optimizer)._init_group is not base._init_group:
        reason = "overridden _init_group"
    elif getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        reason = "GradScaler with fused=True"
    else:
        reason = native(optimizer.param_groups, optimizer.state)
        if reason == "no state":
            with torch.no_grad():
                for group in optimizer.param_groups:
                    optimizer._init_group(group, *([] for _ in range(lists)))
            reason = native(optimizer.param_groups, optimizer.state)
    if reason is not None:
        _C.note_fallback(f"{base.__name__}.step", reason)
        torch_step(base, optimizer)
    return loss
