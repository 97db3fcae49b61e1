"""Torchvision models as they come: one image through eager torch, convert and convert + fuse, and a training
step: python benches/sweep_images.py [--threads N] [--json FILE].

float32, default layout, 224x224, random weights. Outputs are compared before anything is timed; the ratios are eager
torch's time over ours, A/B interleaved.
"""

import argparse
import warnings

import torch
from write_rows import write_rows

import fastnn
from fastnn.bench import compare

IMAGES = ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "googlenet", "densenet121")


def torchvision_models():
    """torchvision.models, also where its compiled operators, which no classification model needs, do not load."""
    try:
        import torchvision.models
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models
    return torchvision.models


def build(models, name):
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(weights=None, **options)
    for m in model.modules():  # statistics as training leaves them, so that folding them shows
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model


def training_step(model, criterion, optimizer, x, y):
    def step():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def row(name, what, converted, fused, plain, seconds):
    a, b = compare(converted, plain, min_pairs=6, seconds=seconds), compare(fused, plain, min_pairs=6, seconds=seconds)
    print(
        f"{name:13s} {what:12s} torch {b.reference * 1e3:7.1f} ms   convert {a.ours * 1e3:7.1f} ms x{a.ratio:.2f}   "
        f"convert + fuse {b.ours * 1e3:7.1f} ms x{b.ratio:.2f} (p20 {b.p20:.2f}, p80 {b.p80:.2f})",
        flush=True,
    )
    return {"model": name, "what": what, "convert": vars(a), "fuse": vars(b)}


def image(models, name, seconds):
    plain = build(models, name).eval()
    converted = fastnn.convert(plain, inplace=False)
    fused = fastnn.fuse(converted)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = plain(x)
        for other in (converted, fused):
            error = (other(x) - expected).abs().max() / expected.abs().max()
            assert error <= 1e-4, f"{name}: relative error {error:.1e}"
        return row(name, "one image", lambda: converted(x), lambda: fused(x), lambda: plain(x), seconds)


def training(models, name, batch, seconds):
    plain = build(models, name).train()
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3, help="per model and way")
    parser.add_argument("--models", nargs="*", default=IMAGES)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    models = torchvision_models()
    rows = [image(models, name, options.seconds) for name in options.models]
    if "resnet18" in options.models:
        rows.append(training(models, "resnet18", 4, options.seconds))
    if options.json:
        write_rows(options.json, rows, threads=options.threads)


if __name__ == "__main__":
    main()
