"""Speed on the present CUDA device, op by op against torch: python benches/run_cuda.py --out out/cuda.json

Every row of cuda_rows.py checks its result first, then times torch and fastnn interleaved with device events. The file
that it writes names the device, driver, versions, date and commit; it is complete after every row. `--device cpu` is a
dry run with tiny tensors, which needs no GPU and whose times mean nothing.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

import torch
from cuda_rows import ROWS, Settings

import fastnn
from fastnn import _build

# ---- one row -------------------------------------------------------------------------------------------------------


def elapsed(function, repeats):
    """Seconds per call on the device."""
    if Settings.dry:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def peak_bytes(function):
    """The most memory one call holds above what was there before it."""
    if Settings.dry:
        function()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(ours, torchs):
    """Median seconds of both, and the median ratio of neighbouring times."""
    pairs, warm, span = (2, 0, 0) if Settings.dry else (12, 3, 5e-3)
    for function in (ours, torchs):
        for _ in range(warm):
            function()
    repeats = max(1, int(span / max(elapsed(ours, 1 + warm), elapsed(torchs, 1 + warm), 1e-6)))
    a, b = [], []
    for i in range(pairs):
        for function, times in ((ours, a), (torchs, b)) if i % 2 == 0 else ((torchs, b), (ours, a)):
            times.append(elapsed(function, repeats))
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in zip(a, b, strict=True))


def check(ours, torchs, tolerance):
    """Fails when a tensor of ours is further from torch's than `tolerance` of its largest value; NaN is never near."""
    for x, y in zip(ours(), torchs(), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, f"{x.shape} {x.dtype}, not {y.shape} {y.dtype}"
        error = (x.float() - y.float()).abs().max().item()
        scale = y.float().abs().max().item() + 1e-30
        assert error <= tolerance * scale, f"differs by {error:.3g} of {scale:.3g}"


def run(name, goal, options, build):
    torch.manual_seed(0)
    fastnn.fallbacks(clear=True)
    result = {"name": name, "goal": goal}
    try:
        ours, torchs, nbytes = build()
        check(ours, torchs, max(options.get("tolerance", 1e-4), 3e-2 if "bfloat16" in name else 0))
        result["fallbacks"] = [f"{op}: {reason}" for op, reason in fastnn.fallbacks()]
        result["peak_bytes"], result["torch_peak_bytes"] = peak_bytes(ours), peak_bytes(torchs)
        result["seconds"], result["torch_seconds"], result["ratio"] = measure(ours, torchs)
        result["gb_per_s"] = nbytes / result["seconds"] * 1e-9
        result["met"] = result["ratio"] >= goal
        line = f"x{result['ratio']:.2f} (goal {goal}) {result['seconds'] * 1e6:9.1f} us {result['gb_per_s']:6.0f} GB/s"
        if "memory" in options:
            result["memory_goal"] = options["memory"]
            result["memory"] = result["peak_bytes"] / max(1, result["torch_peak_bytes"])
            result["met"] &= result["memory"] <= options["memory"]
            line += f" memory x{result['memory']:.2f} (goal {options['memory']})"
        verdict = "dry" if Settings.dry else "" if result["met"] else "MISSED"
        print(f"{verdict:6} {name:75} {line}{' torch' * bool(result['fallbacks'])}", flush=True)
    except Exception:  # noqa: BLE001 - one broken row must not cost the others
        result["error"] = traceback.format_exc()
        print(f"FAILED {name:75} {result['error'].splitlines()[-1]}", flush=True)
    return result


# ---- the report ----------------------------------------------------------------------------------------------------


def shell(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def facts():
    """What the figures hold for."""
    on_device = Settings.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_device else "none: a dry run on the CPU",
        "driver": shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "fastnn": fastnn.__version__,
        "built with CUDA": _build.CUDA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": shell("git", "describe", "--always", "--dirty"),
        "allow_tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def write(path, report):
    """Replaces the file at once: a reader, or a run that is cut off, never leaves half of one."""
    with open(f"{path}.part", "w") as file:
        json.dump(report, file, indent=1)
    os.replace(f"{path}.part", path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run")
    parser.add_argument("--autotune", action="store_true", help="inside fastnn.autotune(); keeps both sides' times")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--until", type=float, default=float("inf"), help="begin no row after this time (date +%%s)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not _build.CUDA:
        sys.exit("this fastnn has no CUDA kernels: build with FASTNN_WITH_CUDA=on (make bench-cuda)")
    Settings.device, Settings.dry = options.device, options.device == "cpu"
    report = {**facts(), "autotune": options.autotune, "rows": [], "not begun": []}
    with contextlib.ExitStack() as stack:
        tuner = None
        if options.autotune:
            tuner = stack.enter_context(fastnn.autotune(stack.enter_context(tempfile.TemporaryDirectory())))
        for row in ROWS:
            if options.only not in row[0]:
                continue
            if time.time() > options.until:
                report["not begun"].append(row[0])
            else:
                report["rows"].append(run(*row))
            if tuner is not None:
                report["choices"] = tuner.choices
            write(options.out, report)
    return int(any("error" in r for r in report["rows"]) or not report["rows"])


if __name__ == "__main__":
    sys.exit(main())
