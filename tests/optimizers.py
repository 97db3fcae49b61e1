"""The optimizers and options that tests try, torch's counterpart of each, and how the two are compared."""

import itertools

import torch

import fastnn

SHAPES = [(3,), (17, 5), (4, 3, 3, 3), (), (0, 4), (1000,)]
DTYPES = [torch.float32, torch.float64]


def options(**choices):
    """Every combination of the given values, options at their first value left out."""
    for values in itertools.product(*choices.values()):
        yield {
            k: v
            for (k, v), choice in zip(zip(choices, values, strict=True), choices.values(), strict=True)
            if v is not choice[0]
        }


CASES = [
    *[
        ("Adam", o)
        for o in options(
            weight_decay=(0, 0.1), amsgrad=(False, True), maximize=(False, True), decoupled_weight_decay=(False, True)
        )
    ],
    ("Adam", {"betas": (0.5, 0.9), "eps": 1e-3}),
    ("Adam", {"fused": True}),
    ("Adam", {"foreach": True}),
    *[("AdamW", o) for o in options(weight_decay=(1e-2, 0.0), amsgrad=(False, True), maximize=(False, True))],
    ("AdamW", {"lr": 0}),
    *[
        ("SGD", o)
        for o in options(momentum=(0, 0.9), dampening=(0, 0.3), weight_decay=(0, 0.1), maximize=(False, True))
    ],
    *[
        ("SGD", {"nesterov": True, "momentum": 0.9, **o})
        for o in options(weight_decay=(0, 0.1), maximize=(False, True))
    ],
    ("SGD", {"momentum": 0.9, "fused": True}),
    ("SGD", {"momentum": 0.9, "foreach": True}),
    *[
        ("Adagrad", o)
        for o in options(
            lr_decay=(0, 0.1), weight_decay=(0, 0.1), initial_accumulator_value=(0, 0.5), maximize=(False, True)
        )
    ],
    ("Adagrad", {"fused": True}),
    *[
        ("RMSprop", o)
        for o in options(momentum=(0, 0.9), centered=(False, True), weight_decay=(0, 0.1), maximize=(False, True))
    ],
    ("RMSprop", {"alpha": 0.5, "eps": 1e-3, "foreach": True}),
    *[("Adadelta", o) for o in options(rho=(0.9, 0.5), weight_decay=(0, 0.1), maximize=(False, True))],
    *[("Yogi", o) for o in options(weight_decay=(0, 0.1), maximize=(False, True), betas=((0.9, 0.999), (0.5, 0.8)))],
]
NAMES = sorted({name for name, _ in CASES})
# The options that touch every piece of state, one case per optimizer.
FULL = {
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"amsgrad": True},
    "SGD": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "eps": 1e-2},
    "Adadelta": {"rho": 0.8, "weight_decay": 0.1},
    "Yogi": {"weight_decay": 0.1},
}


class ReferenceYogi(fastnn.optim.Yogi):
    """The formulas as published, on whole tensors; torch has no Yogi to compare with."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._init_group(group)
            (beta1, beta2), lr = group["betas"], float(group["lr"])
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["step"] += 1
                real = lambda t: torch.view_as_real(t) if t.is_complex() else t  # noqa: E731
                w, g = real(p), real(p.grad) * (-1 if group["maximize"] else 1)
                g = g + group["weight_decay"] * w
                m, s = real(state["exp_avg"]), real(state["exp_avg_sq"])
                m.copy_(beta1 * m + (1 - beta1) * g)
                s.copy_(s - (1 - beta2) * torch.sign(s - g**2) * g**2)
                t = state["step"].item()
                w -= lr * (m / (1 - beta1**t)) / ((s / (1 - beta2**t)).sqrt() + group["eps"])
        return loss


def reference(name):
    return ReferenceYogi if name == "Yogi" else getattr(torch.optim, name)


def name_of(case):
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_grads(step, *parameter_lists):
    """The same gradients for every list, different at every step."""
    for i, ps in enumerate(zip(*parameter_lists, strict=True)):
        generator = torch.Generator().manual_seed(1000 * step + i)
        gradient = torch.randn(ps[0].shape, generator=generator, dtype=torch.float64)
        for p in ps:
            p.grad = gradient.to(p.dtype)


def step_together(step, *optimizers):
    """One step of every optimizer, each with the gradients that set_grads() gives its parameters."""
    set_grads(step, *([p for group in o.param_groups for p in group["params"]] for o in optimizers))
    for o in optimizers:
        o.step()


def tolerance(dtype):
    return {torch.float32: 2e-6, torch.float64: 1e-14}[dtype]


def assert_same(ours, torchs, dtype=torch.float32):
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance(dtype), atol=tolerance(dtype))


def assert_same_state(ours, torchs):
    """Equal state_dicts: the same keys in the same order, types, shapes, strides, and nearly the same values."""
    a, b = ours.state_dict(), torchs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert list(a["state"]) == list(b["state"])
    for x, y in zip(a["state"].values(), b["state"].values(), strict=True):
        assert list(x) == list(y)
        for key in x:
            if x[key] is None:
                assert y[key] is None
                continue
            assert x[key].dtype == y[key].dtype and x[key].stride() == y[key].stride(), key
            scale = max([1.0, *y[key].detach().abs().flatten().tolist()])
            torch.testing.assert_close(x[key], y[key], rtol=1e-5, atol=1e-6 * scale)


def pair(name, ps, qs, **kwargs):
    return getattr(fastnn.optim, name)(ps, **kwargs), reference(name)(qs, **kwargs)
