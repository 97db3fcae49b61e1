"""The parameter lists optimizers are measured on: real models, many small tensors, and more than any cache holds."""

import torch


def _layers(*sizes, bias=True):
    """Weight and bias shapes of layers given as (outputs, *rest)."""
    return [shape for s in sizes for shape in ((s, (s[0],)) if bias else (s,))]


def _resnet20():
    shapes, channels = [(16, 3, 3, 3), (16,), (16,)], 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if channels != width:
                shapes += [(width, channels, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (10, 64), (10,)]


MODELS = {
    "MNIST CNN": _layers((10, 1, 5, 5), (20, 10, 5, 5), (10, 320)),
    "LeNet-5": _layers((6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)),
    "MNIST MLP": _layers((512, 784), (256, 512), (128, 256), (64, 128), (10, 64)),
    "ResNet-20": _resnet20(),
    "160 x 1k": [(1000,)] * 160,
    "20 M": [(1000, 1000)] * 20,
}

# Bytes per float32 parameter that a step has to move: reads and writes of parameter, gradient and state.
OPTIMIZERS = {
    "Adam": ({}, 28),
    "AdamW": ({}, 28),
    "SGD": ({"momentum": 0.9}, 20),
    "Adagrad": ({}, 20),
    "RMSprop": ({}, 20),
    "Adadelta": ({}, 28),
}
HAS_FUSED = ("Adam", "AdamW", "SGD", "Adagrad")


def parameters(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ps = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in MODELS[model]]
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator)
    return ps


def size(model):
    return sum(torch.Size(s).numel() for s in MODELS[model])


def check(ours, torchs):
    """One step of both from the same start, compared."""
    ours.step(), torchs.step()
    for a, b in zip(ours.param_groups[0]["params"], torchs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
