"""What this installation is, and which calls left fastnn's kernels for torch's own."""

import torch

from fastnn import _C, _build


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
        "threads": f"{_C.kernel_threads()} (torch: {torch.get_num_threads()})",
        "CUDA kernels": _build.CUDA or "not in this build",
    }


# What the kernels take, and what goes to torch's own: (what, where it runs).
RULES = [
    ("float32, float64", "fastnn, in the tensor's own precision"),
    ("bfloat16, float16", "fastnn, accumulated in float32"),
    ("any other dtype, mixed dtypes", "torch"),
    ("strided CPU tensors: contiguous, channels_last, slices, expanded", "fastnn"),
    ("sparse, MKL-DNN and nested tensors; other devices", "torch"),
    ("shapes where torch's vendor library was measured faster", "torch"),
    ("arguments torch refuses", "torch, which raises its own error"),
]


def show():
    """Prints what this installation is, what runs natively and which operators it has."""
    from rich.console import Console
    from rich.table import Table

    from fastnn import functional, modules, optim

    console = Console()
    facts = Table(title="this installation", show_header=False)
    for name, text in describe().items():
        facts.add_row(name, text)
    rules = Table("tensors", "run on", title="where a call runs")
    for row in RULES:
        rules.add_row(*row)
    names = Table(title="what there is", show_header=False)
    for module in (functional, modules, optim):
        names.add_row(module.__name__.replace("fastnn.modules", "fastnn"), " ".join(sorted(module.__all__)))
    console.print(facts, rules, names)
    console.print("Calls that went to torch's kernels are counted: fastnn.fallbacks().", highlight=False)
