"""The step every optimizer shares: closure, one call into C++, torch's own step for what the kernels do not take."""

import functools

import torch
from torch.optim import optimizer as torch_optimizer

from fastnn import _C


def hooked(step):
    """torch's wrapper of step() (hooks, a profiler range), entered only when a hook or a profiler waits for it.

    The range alone costs 10 us, four times what a step of a few small tensors takes. torch wraps the step of every
    optimizer class that does not say it is `hooked` already.
    """
    announced = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self, *args, **kwargs):
        if type(self).step is not wrapper and hasattr(type(self).step, "hooked"):
            return step(self, *args, **kwargs)  # a subclass's step calls this one: the hooks run around that
        if (
            torch.compiler.is_compiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or _C.is_recorded()
        ):
            return announced(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True
    return wrapper


def torch_step(base):
    """base.step without the profiling and hooks around it: those already run around our own step."""
    return base.step.__wrapped__ if hasattr(base.step, "hooked") else base.step


def run(optimizer, closure, base, lists, native, other=None):
    """One step of `optimizer`.

    Args:
        closure: as torch.optim's step takes it, or None.
        base: the class whose _init_group creates missing state; torch's own class, but for optimizers torch lacks.
        lists: how many lists base._init_group fills.
        native: the entry point in C++. It returns None when it made the step; otherwise it changed nothing and
            returns the reason.
        other: other(optimizer) makes the step where `native` does not; None for torch's own.
    """
    other = other or torch_step(base)
    if torch.compiler.is_compiling() and base.__module__.startswith("torch."):
        return other(optimizer, closure)
    if torch.cuda.is_initialized() and base is not torch.optim.SGD:
        optimizer._accelerator_graph_capture_health_check()  # a captured step would repeat one value of its counters
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
        if reason != "disabled":
            _C.note_fallback(f"{base.__name__}.step", reason)
        other(optimizer)
    return loss
