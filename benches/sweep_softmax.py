"""Sweep of softmax, log_softmax and cross_entropy against eager torch: ratio, spread, bandwidth, page faults.

python benches/sweep_softmax.py [--threads 1] [--layout channels_last] [--seconds 0.3] [--only cross_entropy]
                                [--json results.json]
"""

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sweep import page_faults, parser, setting, summary, write_rows

import fastnn
from fastnn.bench import compare

ROWS = [(64, 10), (256, 10), (1024, 64), (128, 1000), (32, 32000), (8, 8, 128, 128)]
LOSSES = [(64, 10), (256, 10), (128, 100), (128, 1000), (32, 32000), (512, 32000), (4, 21, 64, 64)]


def logits(shape, layout):
    x = torch.randn(shape)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and x.dim() == 4 else x


def softmax_cases(layout):
    for op in ("softmax", "log_softmax"):
        for shape, dim in [*((s, -1) for s in ROWS), ((4, 21, 64, 64), 1)]:
            x, g = logits(shape, layout), logits(shape, layout)
            y = getattr(torch, op)(x, dim)
            x_grad = x.clone().requires_grad_()

            def forward(f, x=x, dim=dim):
                with torch.no_grad():
                    return f(x, dim)

            def train(f, x=x_grad, dim=dim, g=g):
                out = f(x, dim)
                return (out, *torch.autograd.grad(out, x, g))

            # Bytes: forward reads x, writes y; backward reads g and y, writes dx.
            for mode, call, tensors in (("forward", forward, 2), ("train", train, 5)):
                ours, theirs = getattr(fastnn.functional, op), getattr(F, op)
                yield (
                    f"{op} {mode}",
                    shape,
                    dim,
                    lambda c=call, f=ours: c(f),
                    lambda c=call, f=theirs: c(f),
                    (tensors * y.numel() * y.element_size()),
                )


def loss_cases(layout):
    for shape in LOSSES:
        x = logits(shape, layout).requires_grad_()
        t = torch.randint(shape[1], (shape[0], *shape[2:]))

        def train(f, x=x, t=t):
            loss = f(x, t)
            return loss, *torch.autograd.grad(loss, x)

        # Bytes: forward reads x and writes dx, backward writes nothing more.
        yield (
            "cross_entropy train",
            shape,
            1,
            lambda c=train: c(fastnn.functional.cross_entropy),
            (lambda c=train: c(F.cross_entropy)),
            2 * x.numel() * 4,
        )


def check(ours, theirs):
    """Results are compared before they are timed."""
    a, b = ours(), theirs()
    for p, q in zip(*(r if isinstance(r, tuple) else (r,) for r in (a, b)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def main():
    arguments = parser(__doc__, 0.3, "case", layout=True)
    arguments.add_argument("--only", default="", help="cases whose name contains this")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    columns = ["case", "shape", "dim", "ours us", "torch us", "ratio", "p20", "p80", "GB/s", "faults", "torch's"]
    table = Table(*columns, title=f"{options.layout}, {setting(options)}")
    rows, measured = [], []
    for case, shape, dim, ours, theirs, size in [*softmax_cases(options.layout), *loss_cases(options.layout)]:
        if options.only not in case:
            continue
        check(ours, theirs)
        r = compare(ours, theirs, min_pairs=10, seconds=options.seconds)
        row = [
            case, "x".join(map(str, shape)), dim, round(r.ours * 1e6, 2), round(r.reference * 1e6, 2),
            round(r.ratio, 2), round(r.p20, 2), round(r.p80, 2), round(size / r.ours / 1e9, 1),
            page_faults(ours), page_faults(theirs),
        ]  # fmt: skip
        rows.append(dict(zip(columns, row, strict=True)))
        table.add_row(*map(str, row))
        measured.append((case, r.ratio, row[1]))
    Console(width=120).print(table)
    write_rows(options.json, rows, threads=options.threads, layout=options.layout, summary=summary(measured))


if __name__ == "__main__":
    main()
