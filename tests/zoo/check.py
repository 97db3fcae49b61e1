"""What one model of the zoo must satisfy: converted, it computes what torch.nn computes, and converts back exactly."""

import io
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from rich.console import Console

import fastnn
from fastnn.convert import TWINS
from zoo.models import CLASSES

# A tensor's error is |ours - exact| / |exact|, in 2-norms, exact being torch.nn in float64.
#
# float64: every tensor by itself, to rounding.
DOUBLE = 1e-7
# float32: as many times torch.nn's own error, because a Winograd layer rounds up to ten times as much as a plain sum
# does (see fastnn.set_strict_conv) and depth multiplies what enters; in strict mode a small factor. The floor of the
# gradients, taken together, allows for one ReLU or max-pooling whose near-tie falls on the other side; losses and
# buffers are those of training, where batch norm over a handful of values multiplies every rounding error.
FACTOR, FACTOR_STRICT = 32, 4
FLOOR = {"output": 1e-5, "loss": 1e-3, "buffers": 1e-3, "gradients": 1e-1}
# A model on which torch.nn itself is further off than this says little: such an entry needs a larger image.
USEFUL = 0.3
# Tensors above this size are compared on that many of their elements, spread at an odd stride.
SAMPLE = 1 << 16


@dataclass
class Outcome:
    """What happened to one model."""

    name: str
    converted: int = 0
    left: Counter = field(default_factory=Counter)  # (type, reason) -> layers
    fallbacks: Counter = field(default_factory=Counter)  # (op, reason) -> calls
    errors: dict = field(default_factory=dict)  # what -> (ours, torch.nn's)
    seconds: float = 0


def enliven(model):
    """Random values where constructors put constants, which would hide layers: zero gains, unit statistics."""
    generator = torch.Generator().manual_seed(1)

    def noise(t):
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and p.is_floating_point() and bool((p == p.flatten()[0]).all()):
                p.add_(0.1 * noise(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(0.1 * noise(b))
            if name.endswith("running_var"):
                b.mul_(1 + 0.2 * noise(b).clamp(-2, 2))


def sample(t):
    """A copy of the tensor, or of many of its elements."""
    t = t.detach().flatten()
    return t[:: t.numel() // SAMPLE | 1].clone() if t.numel() > SAMPLE else t.clone()


def outputs(model, x):
    """The model's logits as one tensor; auxiliary heads come after the main one."""
    out = model(x)
    return torch.cat(list(out)) if isinstance(out, (tuple, list)) else out


def evaluate(model, x):
    """Logits in eval mode."""
    torch.manual_seed(2)
    with torch.inference_mode():
        return outputs(model.eval(), x).clone()


def train(model, x, y):
    """Loss, gradients of the image and of every parameter, and buffers after one step's forward and backward.

    Dropout and drop-path draw the same numbers on every call. The model's buffers are put back.
    """
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(3)
    model.train().zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = outputs(model, x)
    loss = torch.nn.functional.cross_entropy(out, y.repeat(len(out) // len(y)))
    loss.backward()
    gradients = {"the image": sample(x.grad)}
    gradients |= {name: sample(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(before[name])
    return loss.detach(), gradients, buffers


def error(ours, exact, scale=0.0):
    """The relative distance of two tensors; `scale` joins the divisor."""
    distance = (ours.double() - exact.double()).norm()
    return (distance / (exact.double().norm() + scale).clamp_min(1e-30)).item()


def joined(tensors):
    """A dict of tensors as one vector."""
    return torch.cat([t.double().flatten() for t in tensors.values()]) if tensors else torch.zeros(1)


def worst(ours, exact):
    """The largest error of two dicts of tensors, tensor by tensor.

    A gradient that is zero but for rounding (a bias before batch norm) is held to the size of the others.
    """
    assert ours.keys() == exact.keys(), ours.keys() ^ exact.keys()
    scale = 1e-3 * joined(exact).norm()
    return max((error(ours[k], exact[k], scale) for k in exact), default=0.0)


def compute(model, x, y):
    """Everything a model computes."""
    loss, gradients, buffers = train(model, x, y)
    return {"output": evaluate(model, x), "loss": loss, "gradients": gradients, "buffers": buffers}


def distances(found, exact, measure):
    """The error of each of compute()'s results; `measure` compares the dicts among them."""
    return {k: (measure if isinstance(v, dict) else error)(found[k], v) for k, v in exact.items()}


def together(ours, exact):
    """The error of two dicts of tensors, each taken as one vector."""
    assert ours.keys() == exact.keys(), ours.keys() ^ exact.keys()
    return error(joined(ours), joined(exact))


def assert_useful(errors, name):
    assert max(errors.values()) < USEFUL, f"{name}: torch.nn's own errors are {errors}: choose a larger image"


def assert_as_good(ours, theirs, factor, name):
    for what, value in ours.items():
        allowed = factor * theirs[what] + FLOOR[what]
        errors = f"error {value:.2e}, torch.nn's {theirs[what]:.2e}, allowed {allowed:.2e}"
        assert value <= allowed, f"{name}, {what}: {errors}"


def snapshot(model):
    """Types, hooks, attributes and parameter objects: all that convert, fuse and revert must leave as they were."""
    modules = [(n, type(m), list(m._forward_hooks), sorted(m.__dict__)) for n, m in model.named_modules()]
    return modules, [(n, id(p)) for n, p in model.named_parameters()]


def examine(entry, strict=False):
    """Converts one model, checks it against torch.nn, and reverts it. Returns its Outcome."""
    start = time.perf_counter()
    result = Outcome(str(entry))
    model = entry.model()
    enliven(model)
    next(m for m in model.modules() if type(m) in TWINS).register_forward_hook(lambda *a: None)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(entry.batch, 3, entry.size, entry.size, generator=generator)
    y = torch.randint(CLASSES, (entry.batch,), generator=generator)

    evaluate(model, x)  # some models fill their buffers on the first call
    exact = compute(model.double(), x.double(), y)
    plain = compute(model.float(), x, y)
    theirs = distances(plain, exact, together)
    assert_useful(theirs, entry)

    before, bits = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    fastnn.convert(model)
    for row in fastnn.report(model, console=Console(file=io.StringIO())):
        if row.native:
            result.converted += 1
        else:
            result.left[row.type, row.reason] += 1
    assert result.converted, f"{entry}: nothing was converted"
    fastnn.fallbacks(clear=True)
    ours = distances(compute(model, x, y), exact, together)
    result.fallbacks.update(fastnn.fallbacks(clear=True))
    result.errors = {what: (ours[what], theirs[what]) for what in ours}
    assert_as_good(ours, theirs, FACTOR, entry)
    if strict:
        with fastnn.set_strict_conv(True):
            assert_as_good(distances(compute(model, x, y), exact, together), theirs, FACTOR_STRICT, f"{entry}, strict")
    double = distances(compute(model.double(), x.double(), y), exact, worst)
    assert max(double.values()) < DOUBLE, f"{entry}, float64: {double}"
    model.float()

    fused = distances({"output": evaluate(fastnn.fuse(model.eval()), x)}, {"output": exact["output"]}, together)
    assert_as_good(fused, theirs, FACTOR, f"{entry}, fused for inference")
    places = [(k, v.data_ptr()) for k, v in model.state_dict().items()]
    fastnn.fuse(model.train())
    assert places == [(k, v.data_ptr()) for k, v in model.state_dict().items()], f"{entry}: fuse moved parameters"
    assert_as_good(distances(compute(model, x, y), exact, together), theirs, FACTOR, f"{entry}, fused for training")

    fastnn.revert(model)
    assert snapshot(model) == before, f"{entry}: revert left a trace"
    for key, value in model.state_dict().items():
        assert torch.equal(value, bits[key]), f"{entry}: {key} changed"
    again = compute(model, x, y)
    assert torch.equal(again["output"], plain["output"]) and torch.equal(again["loss"], plain["loss"])
    assert torch.equal(joined(again["gradients"]), joined(plain["gradients"])), f"{entry}: a step after revert"
    result.seconds = time.perf_counter() - start
    return result
