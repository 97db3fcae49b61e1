"""linear over the layers of common networks against torch: forward and backward ratios, GFLOP/s, share of the FMA peak.

python benches/sweep_linear.py --threads 1 --json benches/results/zen5/linear-1.json
"""

import torch
from rich.console import Console
from rich.table import Table
from sweep import fma_peak, parser, setting, summary, write_rows

import fastnn
from fastnn import functional as F
from fastnn.bench import compare

MLP = [(784, 512), (512, 256), (256, 128), (128, 64), (64, 10)]
HEADS = [(25088, 4096), (4096, 1000), (512, 1000), (2048, 1000)]
# (group, batch, in_features, out_features)
SHAPES = [
    *(("MNIST MLP", m, k, n) for m in (64, 1) for k, n in MLP),
    *(("MNIST CNN", 64, k, n) for k, n in [(320, 10)]),
    *(("CIFAR10 CNN", 64, k, n) for k, n in [(1024, 64), (64, 10)]),
    *(("LeNet", 256, k, n) for k, n in [(400, 120), (120, 84), (84, 10)]),
    *(("classifier head", m, k, n) for m in (32, 1) for k, n in HEADS),
    ("square and skinny", 1024, 1024, 1024),
    ("square and skinny", 8, 1024, 1024),
    ("square and skinny", 1, 1024, 1024),
    ("square and skinny", 1, 8, 1),
]


def measure(m, k, n, seconds):
    """(algorithm, forward Ratio, backward Ratio), after checking the results."""
    x, w = torch.randn(m, k, requires_grad=True), (torch.randn(n, k) / k**0.5).requires_grad_()
    b, g = torch.randn(n, requires_grad=True), torch.randn(m, n)
    ours, torchs = F.linear(x, w, b), torch.nn.functional.linear(x, w, b)

    def backward(y):
        return torch.autograd.grad(y, (x, w, b), g, retain_graph=True)

    for fast, reference in zip((ours, *backward(ours)), (torchs, *backward(torchs)), strict=True):
        error = (fast - reference).abs().max().item()
        if not error <= 1e-4 * (reference.abs().max().item() + 1e-6):
            raise SystemExit(f"{m}x{k}x{n}: results differ by {error:.3g}")
    with torch.no_grad():
        forward = compare(
            lambda: F.linear(x, w, b), lambda: torch.nn.functional.linear(x, w, b), seconds=seconds, min_pairs=10
        )
    both = compare(lambda: backward(ours), lambda: backward(torchs), seconds=seconds, min_pairs=10)
    return fastnn._C.gemm_algorithm(x.detach(), w.detach().t()), forward, both


def main():
    args = parser(__doc__, 0.5, "measurement").parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    table = Table(title=f"linear, {setting(args)}")
    for column in (
        "group",
        "batch x in x out",
        "pass",
        "algorithm",
        "us",
        "torch us",
        "ratio",
        "p20",
        "p80",
        "GFLOP/s",
        "% peak",
    ):
        table.add_column(column, justify="left" if column in ("group", "pass", "algorithm") else "right")
    rows = []
    for group, m, k, n in SHAPES:
        peak = fma_peak() * args.threads  # measured beside each shape: the clock and the neighbours drift
        algorithm, forward, both = measure(m, k, n, args.seconds)
        for name, products, r in (("forward", 1, forward), ("backward", 2, both)):
            gflops = products * 2 * m * k * n / r.ours / 1e9
            rows.append(
                dict(group=group, batch=m, in_features=k, out_features=n, direction=name, algorithm=algorithm,
                     us=r.ours * 1e6, torch_us=r.reference * 1e6, ratio=r.ratio, p20=r.p20, p80=r.p80,
                     gflops=gflops, percent_of_peak=100 * gflops / peak)
            )  # fmt: skip
            table.add_row(
                group, f"{m}x{k}x{n}", name, algorithm if products == 1 else "", f"{r.ours * 1e6:.1f}",
                f"{r.reference * 1e6:.1f}", f"{r.ratio:.2f}", f"{r.p20:.2f}", f"{r.p80:.2f}", f"{gflops:.0f}",
                f"{100 * gflops / peak:.0f}",
            )  # fmt: skip
    Console(width=150).print(table)
    shape = "{batch}x{in_features}x{out_features}"
    measured = [(r["direction"], r["ratio"], shape.format(**r)) for r in rows]
    write_rows(args.json, rows, threads=args.threads, summary=summary(measured))


if __name__ == "__main__":
    main()
