"""Torchvision models as they come: one image through eager torch, convert and convert + fuse, and a training
step: python benches/sweep_images.py [--threads N] [--json FILE].

float32, default layout, 224x224, random weights. Outputs are compared before anything is timed; the ratios are eager
torch's time over ours, A/B interleaved.
"""

import sys
import warnings
from pathlib import Path

import torch
from sweep import parser, training_step, write_rows

import fastnn
from fastnn.bench import compare

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from vision import torchvision  # noqa: E402

IMAGES = ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "googlenet", "densenet121", "deeplabv3_resnet50")
OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "deeplabv3_resnet50": {"weights_backbone": None},
}


def build(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}))
    for m in model.modules():  # statistics as training leaves them, so that folding them shows
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model


def logits(output):
    """Of a segmentation model too, which returns them by name."""
    return output["out"] if isinstance(output, dict) else output


def row(name, what, converted, fused, plain, seconds):
    a, b = compare(converted, plain, min_pairs=6, seconds=seconds), compare(fused, plain, min_pairs=6, seconds=seconds)
    print(
        f"{name:18s} {what:12s} torch {b.reference * 1e3:7.1f} ms   convert {a.ours * 1e3:7.1f} ms x{a.ratio:.2f}   "
        f"convert + fuse {b.ours * 1e3:7.1f} ms x{b.ratio:.2f} (p20 {b.p20:.2f}, p80 {b.p80:.2f})",
        flush=True,
    )
    return {"model": name, "what": what, "convert": vars(a), "fuse": vars(b)}


def image(name, seconds):
    plain = build(name).eval()
    converted = fastnn.convert(plain, inplace=False)
    fused = fastnn.fuse(converted)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = logits(plain(x))
        for other in (converted, fused):
            error = (logits(other(x)) - expected).abs().max() / expected.abs().max()
            assert error <= 1e-4, f"{name}: relative error {error:.1e}"
        return row(name, "one image", lambda: converted(x), lambda: fused(x), lambda: plain(x), seconds)


def training(name, batch, seconds):
    plain = build(name).train()
    converted = fastnn.convert(plain, inplace=False)
    fused = fastnn.fuse(fastnn.convert(plain, inplace=False))
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    steps = [training_step(plain, torch.nn.CrossEntropyLoss(), torch.optim.SGD(plain.parameters(), 0.01, 0.9), x, y)]
    for model in (converted, fused):
        optimizer = fastnn.optim.SGD(model.parameters(), 0.01, 0.9)
        steps.append(training_step(model, fastnn.CrossEntropyLoss(), optimizer, x, y))
    losses = [step() for step in steps]
    assert max(losses) - min(losses) <= 1e-3 * abs(losses[0]), f"{name}: losses {losses}"
    return row(name, f"train x{batch}", steps[1], steps[2], steps[0], seconds)


def main():
    arguments = parser(__doc__, 3, "model and way")
    arguments.add_argument("--models", nargs="*", default=IMAGES)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rows = [image(name, options.seconds) for name in options.models]
    if "resnet18" in options.models:
        rows.append(training("resnet18", 4, options.seconds))
    write_rows(options.json, rows, threads=options.threads)


if __name__ == "__main__":
    main()
