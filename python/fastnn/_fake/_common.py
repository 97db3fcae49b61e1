"""The memory-format rule of csrc/ops/common.cpp, for fake tensors."""

import torch


def dense_format(t):
    """The format the kernels read `t` in: channels_last stays, anything else becomes contiguous."""
    return torch._prims_common.suggest_memory_format(t) if t.dim() == 4 else torch.contiguous_format


def empty_dense(t):
    """An uninitialised tensor like `t` in its dense format."""
    return torch.empty_like(t, memory_format=dense_format(t))
