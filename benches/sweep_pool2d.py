"""Pooling against torch.nn.functional over shapes of known models: ratio, GB/s, page faults; forward and backward.

python benches/sweep_pool2d.py --threads 1 --layout contiguous --json benches/results/zen5/pool2d-contiguous-1.json
"""

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sweep import page_faults, parser, setting, summary, write_rows

import fastnn
from fastnn.bench import compare

MAX = [  # (model, shape, arguments)
    ("MNIST CNN", (64, 10, 24, 24), (2,)),
    ("MNIST CNN", (64, 20, 8, 8), (2,)),
    ("LeNet", (256, 6, 28, 28), (2,)),
    ("LeNet", (256, 16, 10, 10), (2,)),
    ("CIFAR CNN", (64, 32, 32, 32), (2,)),
    ("AlexNet", (8, 64, 55, 55), (3, 2)),
    ("AlexNet", (8, 192, 27, 27), (3, 2)),
    ("AlexNet", (8, 256, 13, 13), (3, 2)),
    ("VGG", (4, 64, 224, 224), (2,)),
    ("VGG", (4, 128, 112, 112), (2,)),
    ("VGG", (4, 256, 56, 56), (2,)),
    ("VGG", (4, 512, 28, 28), (2,)),
    ("VGG", (4, 512, 14, 14), (2,)),
    ("ResNet", (4, 64, 112, 112), (3, 2, 1)),
    ("GoogLeNet", (8, 192, 28, 28), (3, 1, 1)),
    ("GoogLeNet", (8, 512, 14, 14), (3, 1, 1)),
    ("GoogLeNet ceil", (8, 64, 112, 112), (3, 2, 0, 1, True)),
    ("GoogLeNet ceil", (8, 480, 28, 28), (3, 2, 0, 1, True)),
    ("NiN", (8, 96, 54, 54), (3, 2)),
    ("MaxPool3", (64, 32, 24, 24), (3,)),
    ("SPP", (1, 512, 20, 20), (5, 1, 2)),
]
AVG = [
    ("LeNet", (256, 6, 28, 28), (2,)),
    ("LeNet", (256, 16, 10, 10), (2,)),
    ("DenseNet", (4, 256, 56, 56), (2,)),
    ("DenseNet", (4, 512, 28, 28), (2,)),
    ("DenseNet", (4, 1024, 14, 14), (2,)),
    ("Inception", (8, 192, 35, 35), (3, 1, 1)),
    ("Inception", (8, 768, 17, 17), (3, 1, 1)),
    ("ShuffleNet", (8, 24, 56, 56), (3, 2, 1)),
    ("Inception aux", (8, 768, 17, 17), (5, 3)),
    ("CIFAR CNN", (64, 32, 32, 32), (3, 2)),
]
ADAPTIVE = [
    ("VGG", (4, 512, 14, 14), (7,)),
    ("AlexNet", (8, 256, 12, 12), (6,)),
    ("PSPNet", (2, 512, 30, 30), (6,)),
    ("PSPNet", (2, 512, 30, 30), (3,)),
    ("uneven", (8, 256, 13, 13), (6,)),
]
GLOBAL = [
    ("ResNet", (8, 512, 7, 7), (1,)),
    ("NiN", (64, 10, 5, 5), (1,)),
    ("MobileNet", (8, 1280, 7, 7), (1,)),
    ("SE", (8, 64, 56, 56), (1,)),
]
CASES = (
    [("max_pool2d", "max_pool2d", *c) for c in MAX]
    + [("avg_pool2d", "avg_pool2d", *c) for c in AVG]
    + [("adaptive", op, *c) for op in ("adaptive_avg_pool2d", "adaptive_max_pool2d") for c in ADAPTIVE]
    + [("global", "adaptive_avg_pool2d", *c) for c in GLOBAL]
)


def measure(group, op, model, shape, args, what, layout, seconds):
    """One row: `what` is "forward" (no gradient wanted), "forward+taps" (kept for backward) or "backward" alone."""
    x = torch.randn(shape).contiguous(memory_format=layout)
    ours, torchs = getattr(fastnn.functional, op), getattr(F, op)
    x.requires_grad_(what != "forward")
    calls = [lambda f=f: f(x, *args) for f in (ours, torchs)]
    y = torchs(x, *args)
    if what == "backward":
        g = torch.randn_like(y)
        graphs = [ours(x, *args), y]
        calls = [lambda t=t: torch.autograd.grad(t, x, g, retain_graph=True)[0] for t in graphs]
    torch.testing.assert_close(calls[0](), calls[1](), rtol=1e-4, atol=1e-5)  # right before fast
    r = compare(*calls, seconds=seconds, min_pairs=10)
    size = 4 * (x.numel() + y.numel()) + (y.numel() if op.endswith("max_pool2d") and what != "forward" else 0)
    name = f"{op} {'x'.join(map(str, shape))} {','.join(map(str, args))}"
    return {
        "group": f"{group} {what}", "model": model, "case": name, "us": r.ours * 1e6, "torch_us": r.reference * 1e6,
        "ratio": r.ratio, "p20": r.p20, "p80": r.p80, "GB/s": size / r.ours / 1e9,
        "faults": page_faults(calls[0]), "torch_faults": page_faults(calls[1]),
    }  # fmt: skip


def main():
    arguments = parser(__doc__, 0.3, "row", layout=True)
    arguments.add_argument("--filter", default="", help="rows whose operator, shape or model contains this")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    layout = torch.channels_last if options.layout == "channels_last" else torch.contiguous_format
    title = f"pooling, fp32 {options.layout}, {setting(options)}"
    table = Table(title=title)
    for column in ("what", "model", "case", "us", "torch us", "ratio", "p20-p80", "GB/s", "faults", "torch"):
        table.add_column(column, justify="left" if column in ("what", "model", "case") else "right")
    rows = []
    for group, op, model, shape, args in CASES:
        if options.filter not in f"{group} {op} {model} {'x'.join(map(str, shape))}":
            continue
        for what in ("forward", "forward+taps", "backward") if "max" in op else ("forward", "backward"):
            row = measure(group, op, model, shape, args, what, layout, options.seconds)
            rows.append(row)
            table.add_row(
                row["group"], model, row["case"], f"{row['us']:.1f}", f"{row['torch_us']:.1f}", f"{row['ratio']:.2f}",
                f"{row['p20']:.2f}-{row['p80']:.2f}", f"{row['GB/s']:.1f}", f"{row['faults']:.0f}",
                f"{row['torch_faults']:.0f}",
            )  # fmt: skip
    Console(width=170).print(table)
    summary([(r["group"], r["ratio"], r["case"]) for r in rows])
    write_rows(options.json, rows, title=title)


if __name__ == "__main__":
    main()
