"""What this installation is, and which calls left fastnn's kernels for torch's own."""

import torch

from fastnn import _build, _C


def fallbacks(clear=False):
    """Calls that fastnn handed to torch's own kernels, as a dict {(op, reason): count}.

    Args:
        clear: forget the counts after reading them.
    """
    counts = dict(_C.fallbacks())
    if clear:
        _C.clear_fallbacks()
    return counts


def describe():
    """The facts of this installation, as a dict from name to text."""
    from fastnn import __version__

    return {
        "fastnn": __version__,
        "torch": torch.__version__,
        "built for torch": _build.TORCH_VERSION,
        "instruction set": f"{_C.isa()} (of {', '.join(_C.isas())})",
        "threads": str(torch.get_num_threads()),
        "CUDA kernels": _build.CUDA or "not in this build",
    }
