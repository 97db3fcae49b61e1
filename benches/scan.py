"""Random layers, forward and gradients, fastnn against torch: python benches/scan.py [--only conv2d] [--seconds 60].

The sweeps time layers of known networks; this looks for the ones nobody thought of. It prints what runs below --limit
of torch's speed, after timing it again for longer, and one line per family. Results are compared before they are timed.
"""

import argparse
import random
import time

import torch
import torch.nn.functional as reference
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastnn.functional as ours
from fastnn.bench import compare

SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 16, 20, 28, 32, 56)
CHANNELS = (1, 3, 4, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256, 512)
BATCHES = (1, 1, 2, 8, 32, 64)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def image(pick):
    n, c, side = pick(BATCHES), pick(CHANNELS), pick(SIDES)
    layout = pick(list(LAYOUTS))
    x = torch.randn(n, c, side, side).contiguous(memory_format=LAYOUTS[layout])
    return x, f"{n}x{c}x{side}x{side} {layout}"


def conv2d(pick):
    n, side, kernel, stride = pick(BATCHES), pick(SIDES), pick((1, 1, 2, 3, 3, 5, 7)), pick((1, 1, 2))
    padding, dilation, c, k = pick((0, kernel // 2)), pick((1, 1, 1, 2)), pick(CHANNELS), pick(CHANNELS)
    groups = pick((1, 1, 1, 2, 8, c))
    c, k = (max(v, groups) // groups * groups for v in (c, c if groups == c else k))
    out = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    layout = pick(list(LAYOUTS))
    # The last: oneDNN's weight gradient ends the process there (torch 2.13).
    if out < 1 or n * k * c // groups * (out * kernel) ** 2 > 1.5e8 or (kernel == 1 and c % 16 and layout == "nhwc"):
        return None
    x, w = (t.contiguous(memory_format=LAYOUTS[layout]) for t in
            (torch.randn(n, c, side, side), torch.randn(k, c // groups, kernel, kernel)))  # fmt: skip
    arguments = (pick((None, torch.randn(k))), stride, padding, dilation, groups)
    name = f"{n}x{c}x{side}x{side} {layout} -> {k}, {kernel}x{kernel}/{stride} p{padding} d{dilation} g{groups}"
    return name, lambda f, x, w: f.conv2d(x, w, *arguments), (x, w)


def pool2d(pick):
    x, name = image(pick)
    kind, kernel, out = pick(("max", "avg", "adaptive_max", "adaptive_avg")), pick((2, 3, 5)), pick((1, 2, 3, 6, 7))
    stride, padding = pick((1, 2, kernel)), pick((0, kernel // 2))
    if kind.startswith("adaptive"):
        return f"{kind} {name} -> {out}", lambda f, x: getattr(f, f"{kind}_pool2d")(x, out), (x,)
    if x.shape[-1] + 2 * padding < kernel:
        return None
    name = f"{kind} {name}, {kernel}x{kernel}/{stride} p{padding}"
    return name, lambda f, x: getattr(f, f"{kind}_pool2d")(x, kernel, stride, padding), (x,)


def batch_norm(pick):
    x, name = image(pick)
    c, training = x.shape[1], pick((True, True, False))
    if x.numel() <= c:
        return None
    mean, var = torch.zeros(c), torch.ones(c)
    name = f"{name}{' training' * training}"
    return name, lambda f, x, w, b: f.batch_norm(x, mean, var, w, b, training), (x, torch.ones(c), torch.zeros(c))


def softmax(pick):
    shape = [pick((1, 2, 8, 64, 128, 512)), pick((2, 3, 5, 10, 20, 32, 100, 1000, 4096))]
    shape += pick(([], [], [7], [49], [1024]))
    if torch.Size(shape).numel() > 3e6:
        return None
    x, kind = torch.randn(shape), pick(("softmax", "log_softmax", "cross_entropy"))
    if kind != "cross_entropy":
        return f"{kind} {shape}", lambda f, x: getattr(f, kind)(x, 1), (x,)
    target, smoothing = torch.randint(shape[1], shape[:1] + shape[2:]), pick((0.0, 0.0, 0.1))
    return f"{kind} {shape} {smoothing}", lambda f, x: f.cross_entropy(x, target, label_smoothing=smoothing), (x,)


def linear(pick):
    m, k, n = (
        pick((1, 2, 8, 17, 32, 64, 100, 256)),
        pick((1, 3, 8, 16, 64, 100, 512, 1024)),
        pick((1, 2, 10, 64, 512, 1000)),
    )
    tensors = (torch.randn(m, k), torch.randn(n, k), torch.randn(n))
    return f"{m}x{k} -> {n}", lambda f, x, w, b: f.linear(x, w, b), tensors


def activation(pick):
    kind, size = pick(("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu")), pick((1, 16, 1000, 100000, 1000000))
    return f"{kind} {size}", lambda f, x: getattr(f, kind, getattr(torch, kind, None))(x), (torch.randn(size),)


FAMILIES = {f.__name__: f for f in (conv2d, pool2d, batch_norm, softmax, linear, activation)}


def check(result, expected):
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 * float(b.abs().max()) + 1e-3)


def measure(function, tensors, backward, seconds):
    with torch.no_grad():
        gradient = torch.randn(function(reference, *tensors).shape)

    def run(module):
        if not backward:
            with torch.no_grad():
                return (function(module, *tensors),)
        return torch.autograd.grad(function(module, *tensors), tensors, gradient)

    check(run(ours), run(reference))
    return compare(lambda: run(ours), lambda: run(reference), seconds=seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=FAMILIES, nargs="*", default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=60, help="per family")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=0.9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    console = Console(width=140)
    for family in options.only:
        generator, ratios, slow = random.Random(options.seed), [], []
        end = time.monotonic() + options.seconds
        for _ in track(iter(lambda end=end: time.monotonic() < end, False), family, console=console, transient=True):
            drawn = FAMILIES[family](generator.choice)
            if drawn is None:
                continue
            name, function, tensors = drawn
            tensors = tuple(t.requires_grad_() for t in tensors)
            for backward in (False, True):
                ratio = measure(function, tensors, backward, 0.02)
                if ratio.ratio < options.limit:
                    ratio = measure(function, tensors, backward, 0.1)
                ratios.append(ratio.ratio)
                if ratio.ratio < options.limit:
                    slow.append((ratio.ratio, "train" if backward else "forward", name, ratio))
        table = Table("ratio", "pass", "layer", "us", "torch us", title=f"{family}: below x{options.limit}")
        for _, pass_, name, ratio in sorted(slow, key=lambda s: s[0]):
            table.add_row(f"{ratio.ratio:.2f}", pass_, name, f"{ratio.ours * 1e6:.1f}", f"{ratio.reference * 1e6:.1f}")
        console.print(table)
        median = sorted(ratios)[len(ratios) // 2]
        console.print(f"{family}: {len(ratios)} timed, {len(slow)} below x{options.limit}, median x{median:.2f}")


if __name__ == "__main__":
    main()
