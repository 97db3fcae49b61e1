"""torch.compile(fullgraph=True): the results of eager fastnn, forward and backward, and one graph for all steps."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from vision import torchvision

import fastnn
from fastnn.convert import TWINS
from fastnn.train.model import MnistCnn


@pytest.fixture(autouse=True)
def _fresh():
    """No graphs of other tests, and one thread: on a busy machine two wait for each other."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


def vision_model(name):
    return fastnn.convert(torchvision.models.get_model(name, weights=None, num_classes=10))


# Inductor's own compilation of the large networks takes a minute: benches/sweep_compile.py does that.
MODELS = {
    "MNIST CNN": (lambda: MnistCnn(fastnn), (16, 1, 28, 28), "inductor"),
    "ResNet-18": (lambda: vision_model("resnet18"), (2, 3, 64, 64), "aot_eager"),
    "MobileNetV2": (lambda: vision_model("mobilenet_v2"), (2, 3, 64, 64), "aot_eager"),
}


def step(model, criterion, x, y):
    """Loss, gradients and buffers of one training step; the buffers are put back."""
    before = [b.clone() for b in model.buffers()]
    torch.manual_seed(2)  # dropout
    model.zero_grad()
    loss = criterion(x, y)
    loss.backward()
    after = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        for b, value in zip(model.buffers(), before, strict=True):
            b.copy_(value)
    return loss.detach(), [p.grad.clone() for p in model.parameters()], after


@pytest.mark.parametrize("build,shape,backend", MODELS.values(), ids=MODELS)
def test_training_is_eager_fastnn_and_never_recompiles(build, shape, backend):
    model = build()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # the compiler draws its own random numbers
    criterion = fastnn.CrossEntropyLoss()

    def loss(x, y):
        return criterion(model(x), y)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(shape, generator=generator), torch.randint(10, shape[:1], generator=generator)
    (a, grads, after), (b, eager_grads, eager_after) = step(model, compiled, x, y), step(model, loss, x, y)
    for got, expected in zip((a, *grads, *after), (b, *eager_grads, *eager_after), strict=True):
        scale = float(expected.abs().max())  # the eager loss computes its gradient in another order of roundings
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 + 2e-4 * scale)
    optimizer = fastnn.optim.SGD(model.parameters(), lr=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            x = torch.randn(shape, generator=generator)
            optimizer.zero_grad()
            compiled(x, y).backward()
            optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


INPUTS = {nn.Linear: (8,), nn.BatchNorm1d: (8,), nn.CrossEntropyLoss: (8,), nn.NLLLoss: (8,)}
ARGUMENTS = {
    nn.Conv2d: (4, 6, 3), nn.Linear: (8, 5), nn.BatchNorm1d: (8,), nn.BatchNorm2d: (4,), nn.MaxPool2d: (2,),
    nn.AvgPool2d: (2,), nn.AdaptiveAvgPool2d: (3,), nn.AdaptiveMaxPool2d: (3,), nn.Softmax: (1,), nn.LogSoftmax: (1,),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("original", TWINS, ids=lambda c: c.__name__)
def test_one_graph_serves_every_batch_size(original, training):
    layer = TWINS[original](*ARGUMENTS.get(original, ())).train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (5, 7, 3):
        x = torch.randn(batch, *INPUTS.get(original, (4, 8, 8)), requires_grad=training)
        target = (torch.randint(8, (batch,)),) if isinstance(layer, (nn.CrossEntropyLoss, nn.NLLLoss)) else ()
        out, eager = compiled(x, *target), layer(x, *target)
        torch.testing.assert_close(out, eager)
        if training:
            torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), x) for o in (out, eager)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


FALLBACKS = {
    "SiLU": lambda: fastnn.SiLU(inplace=True),
    "LeakyReLU": lambda: fastnn.LeakyReLU(inplace=True),
    "ReLU6": lambda: fastnn.ReLU6(inplace=True),
    "indices": lambda: fastnn.MaxPool2d(2, return_indices=True),
    "same": lambda: fastnn.Conv2d(4, 4, (2, 3), padding="same"),
    "reflect": lambda: fastnn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "no statistics": lambda: fastnn.BatchNorm2d(4, track_running_stats=False).eval(),
    "average": lambda: fastnn.BatchNorm2d(4, momentum=0.3).eval(),
    "complex": lambda: fastnn.Linear(8, 3, dtype=torch.complex64),
    "half the plane": lambda: fastnn.AdaptiveAvgPool2d((None, 2)),
}


@pytest.mark.parametrize("build", FALLBACKS.values(), ids=FALLBACKS)
def test_arguments_for_torchs_kernels_break_no_graph(build):
    layer = build()
    x = torch.randn(2, 4, 8, 8, dtype=torch.complex64 if isinstance(layer, nn.Linear) else torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.clone()), layer(x.clone()))


@pytest.mark.parametrize("size", [8, 12])
def test_channels_last_stays(size):
    model = fastnn.convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)))
    x = torch.randn(2, 4, size, size).contiguous(memory_format=torch.channels_last)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, model(x))


def test_autocast_inside_the_graph():
    model = fastnn.convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)))

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    x = torch.randn(2, 4, 8, 8)
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, run(x))


def test_caches_tell_builds_apart():
    """What the user calls the cache stays, fastnn's digest follows, once."""
    code = "import importlib, torch, fastnn; importlib.reload(fastnn); print(torch.compiler.config.cache_key_tag)"
    environment = {**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": "mine"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert re.fullmatch(r"mine fastnn-[0-9a-f]{16}\n", out)
