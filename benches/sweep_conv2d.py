"""Every convolution shape of eleven networks, fastnn against torch: python benches/sweep_conv2d.py [--quick].

Each line: the layer, layout, batch, forward or training, ratio to torch (median, p20, p80 of pairs), GFLOP/s,
percent of the FMA peak measured at the start, and the algorithm of each pass. Results are checked against torch before
they are timed. The end: geometric mean and worst case per group.
"""

import itertools

import torch
from sweep import fma_peak, parser, setting, summary, write_rows

import fastnn
from fastnn.bench import compare

# network: (training batch, [(input channels, image, output channels, kernel, stride, padding, groups)]), unique shapes
NETWORKS = {
    "MNIST CNN": (64, [(1, 28, 10, 5, 1, 0, 1), (10, 12, 20, 5, 1, 0, 1)]),
    "LeNet-5": (256, [(1, 28, 6, 5, 1, 2, 1), (6, 14, 16, 5, 1, 0, 1)]),
    "CIFAR10 CNN": (64, [(3, 32, 32, 5, 1, 2, 1), (32, 16, 32, 5, 1, 2, 1), (32, 8, 64, 5, 1, 2, 1)]),
    "ResNet-20": (
        128,
        [
            (3, 32, 16, 3, 1, 1, 1),
            (16, 32, 16, 3, 1, 1, 1),
            (16, 32, 32, 3, 2, 1, 1),
            (32, 16, 32, 3, 1, 1, 1),
            (32, 16, 64, 3, 2, 1, 1),
            (64, 8, 64, 3, 1, 1, 1),
        ],
    ),
    "AlexNet": (
        8,
        [
            (3, 224, 64, 11, 4, 2, 1),
            (64, 27, 192, 5, 1, 2, 1),
            (192, 13, 384, 3, 1, 1, 1),
            (384, 13, 256, 3, 1, 1, 1),
            (256, 13, 256, 3, 1, 1, 1),
        ],
    ),
    "VGG16": (
        2,
        [
            (3, 224, 64, 3, 1, 1, 1),
            (64, 224, 64, 3, 1, 1, 1),
            (64, 112, 128, 3, 1, 1, 1),
            (128, 56, 256, 3, 1, 1, 1),
            (256, 28, 512, 3, 1, 1, 1),
            (512, 14, 512, 3, 1, 1, 1),
        ],
    ),
    "ResNet-18": (
        8,
        [
            (3, 224, 64, 7, 2, 3, 1),
            (64, 56, 64, 3, 1, 1, 1),
            (64, 56, 128, 3, 2, 1, 1),
            (64, 56, 128, 1, 2, 0, 1),
            (128, 28, 128, 3, 1, 1, 1),
            (256, 14, 256, 3, 1, 1, 1),
            (512, 7, 512, 3, 1, 1, 1),
        ],
    ),
    "ResNet-50": (
        8,
        [
            (64, 56, 256, 1, 1, 0, 1),
            (256, 56, 64, 1, 1, 0, 1),
            (256, 56, 512, 1, 2, 0, 1),
            (512, 28, 128, 1, 1, 0, 1),
            (256, 14, 1024, 1, 1, 0, 1),
            (1024, 14, 256, 1, 1, 0, 1),
            (2048, 7, 512, 1, 1, 0, 1),
        ],
    ),
    "MobileNetV2": (
        8,
        [
            (32, 112, 32, 3, 1, 1, 32),
            (32, 112, 16, 1, 1, 0, 1),
            (16, 112, 96, 1, 1, 0, 1),
            (96, 112, 96, 3, 2, 1, 96),
            (144, 56, 24, 1, 1, 0, 1),
            (384, 14, 384, 3, 1, 1, 384),
            (384, 14, 64, 1, 1, 0, 1),
            (960, 7, 160, 1, 1, 0, 1),
        ],
    ),
    "GoogLeNet": (
        8,
        [
            (192, 28, 64, 1, 1, 0, 1),
            (96, 28, 128, 3, 1, 1, 1),
            (16, 28, 32, 3, 1, 1, 1),
            (480, 14, 192, 1, 1, 0, 1),
            (832, 7, 384, 1, 1, 0, 1),
        ],
    ),
    "DenseNet": (
        8,
        [(256, 56, 128, 1, 1, 0, 1), (128, 56, 32, 3, 1, 1, 1), (512, 28, 128, 1, 1, 0, 1), (128, 14, 32, 3, 1, 1, 1)],
    ),
}


def kind(c, k, size, stride, groups):
    if groups > 1:
        return "depthwise"
    if size == 1:
        return "pointwise"
    if c <= 3:
        return "1-3 channels"
    return "3x3 stride 1" if size == 3 and stride == 1 else "other"


def measure(layer, batch, layout, training, seconds):
    c, image, k, size, stride, padding, groups = layer
    x = torch.randn(batch, c, image, image).contiguous(memory_format=layout)
    w = torch.randn(k, c // groups, size, size).contiguous(memory_format=layout)
    b = torch.randn(k)
    inputs = [w, b] if c <= 3 else [x, w, b]  # a first layer's input has no gradient
    if training:
        for t in inputs:
            t.requires_grad_()
    g = torch.randn_like(torch.nn.functional.conv2d(x, w, b, stride, padding, 1, groups))

    def run(conv2d):
        y = conv2d(x, w, b, stride, padding, 1, groups)
        return [y, *torch.autograd.grad(y, inputs, g)] if training else [y]

    def ours():
        return run(fastnn.functional.conv2d)

    def theirs():
        return run(torch.nn.functional.conv2d)

    for a, e in zip(ours(), theirs(), strict=True):
        assert (a - e).abs().max() <= 2e-4 * e.abs().max(), layer
    ratio = compare(ours, theirs, seconds=seconds, min_pairs=6)
    flops = 2 * g.numel() * (c // groups) * size * size * (len(inputs) if training else 1)  # one product per pass
    passes = ["forward", *(["grad_input"] if len(inputs) == 3 else []), "grad_weight"] if training else ["forward"]
    pair = lambda v: [v, v]  # noqa: E731
    names = [fastnn._C.conv2d_algorithm(x, w, pair(stride), pair(padding), [1, 1], groups, p) for p in passes]
    return ratio, flops, names


def line(row, peak):
    return (
        f"{row['network']:12s} {row['layer']:26s} {row['layout']} n{row['batch']:<4d}{row['mode']:8s} "
        f"x{row['ratio']:5.2f} ({row['p20']:.2f}-{row['p80']:.2f}) {row['gflops']:6.0f} GFLOP/s "
        f"{100 * row['gflops'] / peak:4.0f}%  {', '.join(row['algorithms'])}"
    )


def main():
    arguments = parser(__doc__, 0.3, "measurement")
    arguments.add_argument("--quick", action="store_true", help="NCHW and no single images, short timings")
    arguments.add_argument("--only", default="", help="networks whose name contains this")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    seconds = 0.05 if options.quick else options.seconds
    layouts = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    if options.quick:
        del layouts["nhwc"]
    peak = fma_peak()
    print(f"{setting(options)}, {peak:.0f} GFLOP/s by mm")
    rows = []
    for network, (batch, layers) in NETWORKS.items():
        if options.only.lower() not in network.lower():
            continue
        modes = [(batch, False), (batch, True)] if options.quick else [(1, False), (batch, False), (batch, True)]
        for layer, (name, layout), (n, training) in itertools.product(layers, layouts.items(), modes):
            ratio, flops, algorithms = measure(layer, n, layout, training, seconds)
            c, image, k, size, stride, _, groups = layer
            rows.append({
                "network": network, "kind": kind(c, k, size, stride, groups),
                "layer": f"{c}x{image}x{image}->{k} {size}x{size}/{stride}" + (f" g{groups}" if groups > 1 else ""),
                "layout": name, "batch": n, "mode": "train" if training else "forward",
                "ratio": ratio.ratio, "p20": ratio.p20, "p80": ratio.p80, "gflops": flops / ratio.ours / 1e9,
                "algorithms": algorithms,
            })  # fmt: skip
            print(line(rows[-1], peak), flush=True)
    measured = [
        (f"{key} {r['mode']}", r["ratio"], f"{r['network']} {r['layer']} {r['layout']} n{r['batch']}")
        for r in rows
        for key in ("all", r["layout"], r["kind"])
    ]
    summary(sorted(measured))
    write_rows(options.json, rows, threads=options.threads, peak_gflops=peak)


if __name__ == "__main__":
    main()
