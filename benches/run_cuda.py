"""Speed on the present CUDA device, op by op against torch: python benches/run_cuda.py --out out/cuda.json

Every row checks its result first, then times torch and fastnn interleaved with device events. The file that it writes
names the device, driver, versions, date and commit. `make bench-cuda` builds for the device and runs it.
"""

import argparse
import contextlib
import datetime
import json
import statistics
import subprocess
import sys
import traceback

import torch

import fastnn
from fastnn import _build

F, FF = torch.nn.functional, fastnn.functional
PAIRS = 12
ROWS = []  # (name, goal, function returning (ours, torchs, bytes))


def row(name, goal):
    """Registers a sweep row: the function returns two callables and the bytes they must move (0: not of interest)."""
    return lambda f: ROWS.append((name, goal, f)) or f


def elapsed(function, repeats):
    """Seconds per call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def peak_bytes(function):
    """The most memory one call holds above what was there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(ours, torchs):
    for function in (ours, torchs):
        for _ in range(3):
            function()
    repeats = max(1, int(5e-3 / max(elapsed(ours, 3), elapsed(torchs, 3), 1e-6)))
    a, b = [], []
    for i in range(PAIRS):
        for function, times in ((ours, a), (torchs, b)) if i % 2 == 0 else ((torchs, b), (ours, a)):
            times.append(elapsed(function, repeats))
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in zip(a, b, strict=True))


def check(ours, torchs, tolerance):
    for x, y in zip(ours(), torchs(), strict=True):
        if x is not None:
            error = (x.float() - y.float()).abs().max().item()
            scale = y.float().abs().max().item() + 1e-30
            assert error <= tolerance * scale, f"differs by {error:.3g} of {scale:.3g}"


def train(op, x, *args, **kwargs):
    """(fastnn's, torch's) forward and backward of op(x, ...), each as a callable returning [output, gradient]."""
    x.requires_grad_()
    seed = torch.randn_like(getattr(F, op)(x, *args, **kwargs))

    def run(library):
        def call():
            y = getattr(library, op)(x, *args, **kwargs)
            return [y, *torch.autograd.grad(y, x, seed)]

        return call

    return run(FF), run(F)


def randn(*shape, dtype=torch.float32, channels_last=False):
    x = torch.randn(shape, device="cuda").to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


# ---- the sweep -----------------------------------------------------------------------------------------------------

for dtype, goal in ((torch.float32, 1.3), (torch.bfloat16, 1.6)):
    for channels_last in (False, True):
        layout = "NHWC" if channels_last else "NCHW"

        @row(f"max_pool2d 3x3/2 forward+backward {layout} {dtype}", goal)
        def _(dtype=dtype, channels_last=channels_last):
            x = randn(64, 64, 112, 112, dtype=dtype, channels_last=channels_last)
            return *train("max_pool2d", x, 3, 2, 1), int(2.5 * x.nbytes)


@row("avg_pool2d 2x2 forward+backward NCHW float32", 2.5)
def _():
    x = randn(64, 64, 112, 112)
    return *train("avg_pool2d", x, 2), int(2.5 * x.nbytes)


for rows, classes in ((8192, 1000), (4096, 4096), (1024, 32768), (65536, 64)):
    for dtype in (torch.float32, torch.bfloat16):

        @row(f"softmax forward+backward {rows}x{classes} {dtype}", 1.3)
        def _(rows=rows, classes=classes, dtype=dtype):
            x = randn(rows, classes, dtype=dtype)
            return *train("softmax", x, -1), 5 * x.nbytes


for rows, classes in ((2048, 32768), (1024, 131072), (8192, 1000)):

    @row(f"cross_entropy forward+backward {rows}x{classes} float32", 2.0 if classes > 30000 else 0.95)
    def _(rows=rows, classes=classes):
        x = randn(rows, classes)
        return *train("cross_entropy", x, torch.randint(0, classes, (rows,), device="cuda")), 3 * x.nbytes


@row("batch_norm training forward+backward NCHW float32", 1.6)
def _():
    x, w, b = randn(64, 64, 56, 56), randn(64), randn(64)
    return *train("batch_norm", x, None, None, w, b, True), 5 * x.nbytes


@row("batch_norm training forward+backward NHWC bfloat16", 0.95)
def _():
    x = randn(64, 64, 56, 56, dtype=torch.bfloat16, channels_last=True)
    w, b = randn(64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16)
    return *train("batch_norm", x, None, None, w, b, True), 5 * x.nbytes


for dtype in (torch.float32, torch.bfloat16):

    @row(f"batch_norm+add+relu training forward+backward NHWC {dtype}", 1.6)
    def _(dtype=dtype):
        x, other = (randn(64, 64, 56, 56, dtype=dtype, channels_last=True).requires_grad_() for _ in "ab")
        w, b = randn(64, dtype=dtype), randn(64, dtype=dtype)
        seed = torch.randn_like(x)

        def step(function):
            y = function()
            return [y, *torch.autograd.grad(y, (x, other), seed)]

        ours = lambda: FF.batch_norm_add_relu(x, other, None, None, w, b, True)  # noqa: E731
        torchs = lambda: F.relu(F.batch_norm(x, None, None, w, b, True) + other)  # noqa: E731
        return lambda: step(ours), lambda: step(torchs), 8 * x.nbytes


@row("relu forward+backward float32", 0.95)
def _():
    x = randn(64, 64, 56, 56)
    return *train("relu", x), 5 * x.nbytes


@row("linear 4096^3 strict float32", 1.5)
def _():
    x, w = randn(4096, 4096), randn(4096, 4096)
    return lambda: [FF.linear(x, w)], lambda: [F.linear(x, w)], 0


for channels_last in (False, True):
    for kernel, stride in ((3, 1), (3, 2), (5, 1)):
        layout = "NHWC" if channels_last else "NCHW"

        @row(f"conv2d depthwise {kernel}x{kernel}/{stride} forward+backward {layout} float32", 2.0)
        def _(channels_last=channels_last, kernel=kernel, stride=stride):
            x = randn(32, 256, 56, 56, channels_last=channels_last).requires_grad_()
            w = randn(256, 1, kernel, kernel).requires_grad_()
            arguments = (x, w, None, stride, kernel // 2, 1, 256)
            seed = torch.randn_like(F.conv2d(*arguments))

            def step(library):
                y = library.conv2d(*arguments)
                return [y, *torch.autograd.grad(y, (x, w), seed)]

            return lambda: step(FF), lambda: step(F), 3 * (x.nbytes + seed.nbytes)


for torchs_options, goal in (({"foreach": True}, 2.5), ({"fused": True}, 1.0)):
    for what, shapes in (
        ("160 tensors of 25 M", [(400, 400)] * 160),
        ("5 small tensors", [(10, 25), (10,), (320, 10)] * 2),
    ):

        @row(f"Adam {what} against {next(iter(torchs_options))}", goal)
        def _(options=torchs_options, shapes=shapes):
            def stepper(cls, **kwargs):
                generator = torch.Generator("cuda").manual_seed(0)
                parameters = [torch.nn.Parameter(torch.randn(s, device="cuda", generator=generator)) for s in shapes]
                for p in parameters:
                    p.grad = torch.randn(p.shape, device="cuda", generator=generator)
                optimizer = cls(parameters, lr=1e-3, **kwargs)
                return lambda: [optimizer.step(), *parameters][1:]

            nbytes = 7 * 4 * sum(torch.Size(s).numel() for s in shapes)
            return stepper(fastnn.optim.Adam), stepper(torch.optim.Adam, **options), nbytes


@row("SGD momentum 160 tensors of 25 M against foreach", 0.95)
def _():
    def stepper(cls, **kwargs):
        parameters = [torch.nn.Parameter(torch.ones(400, 400, device="cuda")) for _ in range(160)]
        for p in parameters:
            p.grad = torch.full_like(p, 1e-3)
        optimizer = cls(parameters, lr=1e-3, momentum=0.9, **kwargs)
        return lambda: [optimizer.step(), *parameters][1:]

    return stepper(fastnn.optim.SGD), stepper(torch.optim.SGD, foreach=True), 5 * 4 * 160 * 400 * 400


@row("clip_grad_norm_ 160 tensors of 25 M against foreach", 0.95)
def _():
    def clipper(function, **kwargs):
        parameters = [torch.nn.Parameter(torch.ones(400, 400, device="cuda")) for _ in range(160)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        return lambda: [function(parameters, 1.0, **kwargs), *(p.grad for p in parameters)]

    nbytes = 3 * 4 * 160 * 400 * 400
    return clipper(fastnn.clip_grad_norm_), clipper(torch.nn.utils.clip_grad_norm_, foreach=True), nbytes


# ---- whole training steps ------------------------------------------------------------------------------------------


def training(nn, optim, build, x, y, autocast=None):
    """A callable for one step of the model that `build(nn)` defines: [loss]."""
    torch.manual_seed(0)
    model = build(nn).cuda()
    if x.is_contiguous(memory_format=torch.channels_last):
        model = model.to(memory_format=torch.channels_last)
    if autocast and nn is fastnn:
        model = fastnn.fuse(model)
    optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    cross_entropy = (FF if nn is fastnn else F).cross_entropy

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def mnist_cnn(nn):
    features = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    return torch.nn.Sequential(*features, torch.nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10))


@row("MNIST CNN training step, batch 64, float32", 2.0)
def _():
    x, y = randn(64, 1, 28, 28), torch.randint(0, 10, (64,), device="cuda")
    return training(fastnn, fastnn.optim, mnist_cnn, x, y), training(torch.nn, torch.optim, mnist_cnn, x, y), 0


class Bottleneck(torch.nn.Module):
    def __init__(self, nn, channels, width, stride):
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut = torch.nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = torch.nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50(nn):
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Bottleneck(nn, channels, width, stride if i == 0 else 1))
            channels = 4 * width
    return torch.nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), nn.Linear(channels, 1000))


@row("ResNet-50 training step, batch 64, bfloat16 autocast NHWC, fused", 1.15)
def _():
    x, y = randn(64, 3, 224, 224, channels_last=True), torch.randint(0, 1000, (64,), device="cuda")
    bf16 = torch.bfloat16
    return (
        training(fastnn, fastnn.optim, resnet50, x, y, bf16), training(torch.nn, torch.optim, resnet50, x, y, bf16), 0
    )  # fmt: skip


# ---- the report ----------------------------------------------------------------------------------------------------


def shell(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def facts():
    return {
        "device": torch.cuda.get_device_name(),
        "driver": shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "built with CUDA": _build.CUDA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": shell("git", "describe", "--always", "--dirty"),
        "allow_tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--autotune", action="store_true", help="inside fastnn.autotune()")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    options = parser.parse_args()
    if not _build.CUDA:
        sys.exit("this fastnn has no CUDA kernels: build with FASTNN_WITH_CUDA=on (make bench-cuda)")
    report = {**facts(), "autotune": options.autotune, "rows": []}
    with fastnn.autotune() if options.autotune else contextlib.nullcontext():
        sweep(options, report)
    sys.exit(any("error" in r for r in report["rows"]))


def sweep(options, report):
    for name, goal, build in ROWS:
        if options.only not in name:
            continue
        torch.manual_seed(0)
        fastnn.fallbacks(clear=True)
        result = {"name": name, "goal": goal}
        try:
            ours, torchs, nbytes = build()
            check(ours, torchs, 3e-2 if "bfloat16" in name else 1e-4)
            result["fallbacks"] = [f"{op}: {reason}" for op, reason in fastnn.fallbacks()]
            result["peak_bytes"], result["torch_peak_bytes"] = peak_bytes(ours), peak_bytes(torchs)
            result["seconds"], result["torch_seconds"], result["ratio"] = measure(ours, torchs)
            result["gb_per_s"] = nbytes / result["seconds"] * 1e-9
            print(
                f"{name:60} x{result['ratio']:.2f} (goal {goal}) {result['seconds'] * 1e6:9.1f} us "
                f"{result['gb_per_s']:6.0f} GB/s {'aten' if result['fallbacks'] else ''}",
                flush=True,
            )
        except Exception:  # noqa: BLE001: one broken row must not cost the others
            result["error"] = traceback.format_exc()
            print(f"{name:60} FAILED: {result['error'].splitlines()[-1]}", flush=True)
        report["rows"].append(result)
        with open(options.out, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
