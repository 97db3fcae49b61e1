"""A training step of whole networks under torch.compile: python benches/sweep_compile.py [name ...] [--size N]
[--threads N] [--json benches/results/zen5/compile-1.json].

Four ways side by side: torch.nn and fastnn, each eager and compiled with fullgraph=True. Loss and gradients of compiled
fastnn are compared with eager fastnn before anything is timed, and twenty steps must not compile again.
"""

import copy
import sys
import time
from pathlib import Path

import torch
from sweep import parser, write_rows
from torch import nn
from torch._inductor.utils import fresh_cache

import fastnn
from fastnn.bench import compare
from fastnn.train.model import MnistCnn

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from vision import torchvision  # noqa: E402


def vision_model(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # the compiler draws its own random numbers
    return model


MODELS = {
    "mnist_cnn": (lambda: fastnn.revert(MnistCnn(fastnn)), lambda size: (64, 1, 28, 28)),
    "resnet18": (lambda: vision_model("resnet18"), lambda size: (4, 3, size, size)),
    "mobilenet_v2": (lambda: vision_model("mobilenet_v2"), lambda size: (4, 3, size, size)),
}


def stepper(model, forward, x, y):
    def step():
        for p in model.parameters():
            p.grad = None
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        return loss

    return step


def sweep(name, size, seconds):
    """The rows of one network: each way's times against eager torch.nn's."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    plain = build()
    fast = fastnn.convert(copy.deepcopy(plain))
    x, y = torch.randn(shape(size)), torch.randint(10, shape(size)[:1])
    torch._dynamo.reset()
    compiled = [torch.compile(m, fullgraph=True) for m in (plain, fast)]
    eager_torch, eager_fast = stepper(plain, plain, x, y), stepper(fast, fast, x, y)
    start = time.perf_counter()
    steps = [stepper(m, c, x, y) for m, c in zip((plain, fast), compiled, strict=True)]
    expected = eager_fast(), [p.grad.clone() for p in fast.parameters()]
    found = steps[1](), [p.grad.clone() for p in fast.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    steps[0]()
    compiling = time.perf_counter() - start
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(20):
            steps[1]()
    rows = []
    for way, one in (("fastnn", eager_fast), ("torch compiled", steps[0]), ("fastnn compiled", steps[1])):
        result = compare(one, eager_torch, seconds=seconds)
        rows.append({"model": name, "shape": shape(size), "way": way, **vars(result)})
        print(f"{name:13} {way:16} {result}", flush=True)
    print(f"{name:13} compiled twice in {compiling:.0f} s; no recompilation in 20 steps", flush=True)
    return rows


def main():
    arguments = parser(__doc__, 2, "network and way")
    arguments.add_argument("names", nargs="*", default=list(MODELS))
    arguments.add_argument("--size", type=int, default=112)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    with fresh_cache():  # what another build compiled is not measured
        rows = [row for name in options.names for row in sweep(name, options.size, options.seconds)]
    write_rows(options.json, rows, threads=options.threads)


if __name__ == "__main__":
    main()
