"""The memory-format rules of csrc/ops, for fake tensors."""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def dense_format(t):
    """The format the kernels read `t` in: channels_last stays, anything else becomes contiguous."""
    return torch._prims_common.suggest_memory_format(t) if t.dim() == 4 else torch.contiguous_format


def empty_dense(t):
    """An uninitialised tensor like `t` in its dense format."""
    return torch.empty_like(t, memory_format=dense_format(t))


def format_as_it_lies(t):
    """The format in which `t` has no gaps, or None: csrc/ops/memory.cpp's rule."""
    formats = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
    return next((f for f in formats if t.is_contiguous(memory_format=f)), None)


def is_empty(t):
    """Whether `t` surely has no elements: sizes that are not known are not asked."""
    return statically_known_true(t.numel() == 0)


def empty_as_it_lies(t):
    """An uninitialised tensor like `t`, as fresh_like() makes it."""
    return torch.empty_like(t, memory_format=format_as_it_lies(t) or torch.preserve_format)
