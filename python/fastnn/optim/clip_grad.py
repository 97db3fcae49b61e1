"""Gradient clipping by the norm of all gradients."""

import types

import torch

from fastnn import _C


def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
    """Scales the gradients in place so that the norm of all of them together is at most `max_norm`.

    One read of all gradients for the norm, then one read and write to scale them (none when they are small enough).

    Args:
        parameters: a tensor or an iterable of tensors; those without a gradient are skipped.
        max_norm: the largest norm allowed.
        norm_type: 2.0, 1.0 or inf run on fastnn's kernels; any other p takes torch's function.
        error_if_nonfinite: raise instead of scaling by a norm that is nan or inf.
        foreach: accepted; the kernels need no such choice.

    Returns:
        The norm before clipping, a scalar tensor of the gradients' dtype.

    Raises what torch.nn.utils.clip_grad_norm_ raises. Source: torch.nn.utils.clip_grad_norm_.
    """
    if torch.compiler.is_compiling():
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    if isinstance(parameters, torch.Tensor):
        kept = [parameters]
    else:
        kept = list(parameters)
        if kept or not isinstance(parameters, types.GeneratorType):
            parameters = kept  # torch warns of an empty generator when it sees one
    grads = [p.grad for p in kept if p.grad is not None]
    if not grads:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    reason, total = _C.clip_grad_norm_(grads, float(max_norm), float(norm_type), error_if_nonfinite)
    if reason is None:
        return total
    if reason != "disabled":
        _C.note_fallback("clip_grad_norm_", reason)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
