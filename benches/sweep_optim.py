"""Every optimizer on every model against torch's default and fused steps: ratios, GB/s, page faults.

python benches/sweep_optim.py [--seconds 1] [--only Adam SGD] [--threads 1] [--out benches/results/zen5/optim.md]
"""

import argparse
import sys

import torch
from optim_models import HAS_FUSED, MODELS, OPTIMIZERS, check, parameters, size
from sweep import geomean, page_faults, setting

import fastnn
from fastnn.bench import compare


def measured_bandwidth(footprint):
    """GB/s of the best plain read + write of this many bytes in one thread: torch's in-place multiplication."""
    x = torch.ones(max(1024, footprint // 4))
    times = [compare(lambda: x.mul_(1.0), lambda: None, min_pairs=5, seconds=0.1).ours for _ in range(2)]
    return 2 * 4 * x.numel() / min(times) / 1e9


def rows(only, seconds):
    for model in MODELS:
        n = size(model)
        for name in only:
            if name == "clip_grad_norm_":
                ps = parameters(model)
                ours, torchs, fused, moved, footprint = (
                    lambda ps=ps: fastnn.clip_grad_norm_(ps, 1e-3),
                    lambda ps=ps: torch.nn.utils.clip_grad_norm_(ps, 1e-3),
                    None,
                    12 * n,
                    4 * n,
                )
            else:
                options, per_parameter = OPTIMIZERS[name]

                def make(module, name=name, model=model, options=options, **more):
                    return getattr(module, name)(parameters(model), lr=1e-3, **options, **more)

                check(make(fastnn.optim), make(torch.optim))
                ours, torchs = make(fastnn.optim).step, make(torch.optim).step
                fused = make(torch.optim, fused=True).step if name in HAS_FUSED else None
                moved, footprint = per_parameter * n, 4 * n * (4 if per_parameter == 28 else 3)
            default = compare(ours, torchs, seconds=seconds)
            against_fused = compare(ours, fused, seconds=seconds) if fused else None
            best = min(r.ours for r in (default, against_fused) if r)
            yield model, name, n, default, against_fused, moved / best / 1e9, footprint, page_faults(ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", default=[*OPTIMIZERS, "clip_grad_norm_"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth = {}
    lines = [
        f"# Optimizer steps, float32, {setting(arguments)}",
        "",
        "Ratios are torch's time over fastnn's, interleaved medians (p20 to p80); GB/s counts the compulsory reads and",
        "writes; % is of the measured read + write bandwidth of one array of the same footprint.",
        "",
        "| model | parameters | optimizer | us | x default | x fused | GB/s | % | faults |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    ratios = {}
    for model, name, n, default, fused, speed, footprint, faults in rows(arguments.only, arguments.seconds):
        if footprint not in bandwidth:
            bandwidth[footprint] = measured_bandwidth(footprint)
        ratios.setdefault(name, []).append(default.ratio)
        text = [f"{r.ratio:.2f} ({r.p20:.2f} to {r.p80:.2f})" if r else "" for r in (default, fused)]
        lines.append(
            f"| {model} | {n:,} | {name} | {default.ours * 1e6:.1f} | {text[0]} | {text[1]} | {speed:.1f} "
            f"| {100 * speed / bandwidth[footprint]:.0f} | {faults:.0f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "Geometric means over the models, and the worst: "
        + ", ".join(f"{name} x{geomean(r):.2f} (x{min(r):.2f})" for name, r in ratios.items())
        + ".",
    ]
    print("\n".join(lines[-2:]))
    if fastnn.fallbacks():
        sys.exit(f"fell back to torch: {fastnn.fallbacks()}")
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
