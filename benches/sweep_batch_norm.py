"""Sweep of batch norm over the feature maps of residual, mobile and dense networks: fastnn against eager torch."""

import math

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sweep import page_faults, parser, setting, summary, write_rows

import fastnn
from fastnn.bench import compare

SHAPES = [
    *[(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)],  # ResNet-20
    *[
        (n, c, s, s) for n in (4, 1) for c, s in [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28)]
    ],  # ResNet-18, -50
    *[(n, c, s, s) for n in (4, 1) for c, s in [(1024, 14), (2048, 7)]],
    *[(4, 32, 112, 112), (4, 96, 112, 112), (4, 144, 56, 56)],  # MobileNetV2
    *[(4, 96, 56, 56), (4, 224, 28, 28), (4, 544, 14, 14)],  # DenseNet-121
    *[(256, 512), (64, 128)],  # BatchNorm1d
]


def tensors(shape, layout):
    x = torch.randn(shape)
    if layout == "channels_last" and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    c = shape[1]
    return x, torch.zeros(c), torch.ones(c), torch.rand(c) + 0.5, torch.randn(c)


def relu_of(x, r, *args):
    return F.relu(F.batch_norm(x, *args))


def add_relu_of(x, r, *args):
    return F.relu(F.batch_norm(x, *args) + r)


def workloads(shape, layout):
    """(group, passes over the tensor that cannot be avoided, fastnn's call, torch's call)."""
    x, mean, var, w, b = tensors(shape, layout)
    grad, residual = torch.randn_like(x), torch.randn_like(x)
    ours, theirs = fastnn.functional.batch_norm, F.batch_norm

    def forward(function, training):
        def call():
            with torch.no_grad():
                return [function(x, mean, var, w, b, training)]

        return call

    yield "forward, training", 2, forward(ours, True), forward(theirs, True)
    yield "forward, evaluation", 2, forward(ours, False), forward(theirs, False)

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]

    def backward(function):
        y = function(leaves[0], mean, var, leaves[1], leaves[2], True)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    yield "backward, training", 3, backward(ours), backward(theirs)

    r = residual.clone().requires_grad_()

    def both(function, inputs):
        return lambda: torch.autograd.grad(function(leaves[0], r, mean, var, leaves[1], leaves[2], True), inputs, grad)

    def relu(x, r, *args):
        return fastnn.functional.batch_norm_relu(x, *args)

    add_relu = fastnn.functional.batch_norm_add_relu
    yield "bn+relu, forward and backward", 6, both(relu, leaves), both(relu_of, leaves)
    yield "bn+add+relu, forward and backward", 8, both(add_relu, [*leaves, r]), both(add_relu_of, [*leaves, r])


def check(ours, theirs, name):
    for a, b in zip(ours(), theirs(), strict=True):
        # The mean: an output within rounding of zero may have another sign, and then another gradient; torch's own
        # outputs are 6e-6 off in channels_last (float64 says), which makes 2e-3 of the weight's gradient.
        error = (a - b).abs().mean().item() / (b.abs().mean().item() + 1e-30)
        assert error < 1e-2, f"{name}: error {error:.2g}"


def main():
    options = parser(__doc__, 0.2, "case", layout=True).parse_args()
    torch.set_num_threads(options.threads)

    rows, measured = [], []
    for shape in SHAPES:
        for group, passes, ours, theirs in workloads(shape, options.layout):
            name = f"{group} {'x'.join(map(str, shape))}"
            check(ours, theirs, name)
            result = compare(ours, theirs, min_pairs=7, seconds=options.seconds)
            measured.append((group, result.ratio, "x".join(map(str, shape))))
            rows.append({
                "group": group, "shape": shape, "ours_us": result.ours * 1e6, "torch_us": result.reference * 1e6,
                "ratio": result.ratio, "p20": result.p20, "p80": result.p80,
                "gb_per_s": passes * 4 * math.prod(shape) / result.ours / 1e9,
                "page_faults": page_faults(ours), "torch_page_faults": page_faults(theirs),
            })  # fmt: skip

    title = f"batch_norm, float32, {options.layout}, {setting(options)}"
    table = Table(
        "group", "shape", "fastnn us", "torch us", "ratio", "p20", "p80", "GB/s", "faults", "torch's", title=title
    )
    for r in sorted(rows, key=lambda r: r["group"]):
        table.add_row(
            r["group"], "x".join(map(str, r["shape"])), f"{r['ours_us']:.0f}", f"{r['torch_us']:.0f}",
            f"{r['ratio']:.2f}", f"{r['p20']:.2f}", f"{r['p80']:.2f}", f"{r['gb_per_s']:.1f}",
            f"{r['page_faults']:.0f}", f"{r['torch_page_faults']:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)
    summary(measured)
    write_rows(options.json, rows, title=title)


if __name__ == "__main__":
    main()
