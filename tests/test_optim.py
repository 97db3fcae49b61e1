"""fastnn.optim against torch.optim: the same updates, state and checkpoints, option by option."""

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastnn

SHAPES = [(3,), (17, 5), (4, 3, 3, 3), (), (0, 4), (1000,)]
DTYPES = [torch.float32, torch.float64]


def options(**choices):
    """Every combination of the given values, options at their first value left out."""
    for values in itertools.product(*choices.values()):
        yield {k: v for (k, v), choice in zip(zip(choices, values, strict=True), choices.values(), strict=True)
               if v is not choice[0]}


CASES = [
    *[("Adam", o) for o in options(weight_decay=(0, 0.1), amsgrad=(False, True), maximize=(False, True),
                                   decoupled_weight_decay=(False, True))],
    ("Adam", {"betas": (0.5, 0.9), "eps": 1e-3}),
    ("Adam", {"fused": True}),
    ("Adam", {"foreach": True}),
    *[("AdamW", o) for o in options(weight_decay=(1e-2, 0.0), amsgrad=(False, True), maximize=(False, True))],
    ("AdamW", {"lr": 0}),
    *[("SGD", o) for o in options(momentum=(0, 0.9), dampening=(0, 0.3), weight_decay=(0, 0.1),
                                  maximize=(False, True))],
    *[("SGD", {"nesterov": True, "momentum": 0.9, **o}) for o in options(weight_decay=(0, 0.1), maximize=(False, True))],
    ("SGD", {"momentum": 0.9, "fused": True}),
    ("SGD", {"momentum": 0.9, "foreach": True}),
    *[("Adagrad", o) for o in options(lr_decay=(0, 0.1), weight_decay=(0, 0.1), initial_accumulator_value=(0, 0.5),
                                      maximize=(False, True))],
    ("Adagrad", {"fused": True}),
    *[("RMSprop", o) for o in options(momentum=(0, 0.9), centered=(False, True), weight_decay=(0, 0.1),
                                      maximize=(False, True))],
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
                real = (lambda t: torch.view_as_real(t) if t.is_complex() else t)  # noqa: E731
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


# ---- the same updates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_twenty_steps(case, dtype):
    """Our distance from torch in float64 is at most twice torch's own, above a floor of a few rounding steps."""
    name, kwargs = case
    kwargs = {"lr": 1e-2, **kwargs}
    ps, qs = parameters(dtype), parameters(dtype)
    rs = [torch.nn.Parameter(p.detach().clone().double()) for p in ps]
    ours, torchs = pair(name, ps, qs, **kwargs)
    exact = reference(name)(rs, **kwargs)
    for step in range(20):
        set_grads(step, ps, qs)
        for p, r in zip(ps, rs, strict=True):
            r.grad = p.grad.double()
        for optimizer in (ours, torchs, exact):
            optimizer.step()
    assert_same_state(ours, torchs)
    for p, q, r in zip(ps, qs, rs, strict=True):
        if p.numel():
            floor = 16 * torch.finfo(dtype).eps * r.abs().max()
            assert (p - r).abs().max() <= 2 * (q - r).abs().max() + floor
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("name", NAMES)
def test_isas(name, isa):
    assert fastnn._C.set_isa(isa)
    for dtype in DTYPES:
        test_twenty_steps((name, FULL[name]), dtype)
    assert fastnn._C.isa() == isa


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype, isa):
    """One step from the same state: our error against float64 is at most torch's own, which rounds every operation."""
    fastnn._C.set_isa(isa)
    shapes = [(257,), (31, 8)]
    kwargs = {"lr": 1e-2, **FULL[name]}
    if "eps" in reference(name)(parameters()).defaults:
        kwargs["eps"] = 1e-3  # 1e-8 is zero in float16
    warm = parameters(dtype, shapes)
    torchs = reference(name)(warm, **kwargs)
    for step in range(3):
        set_grads(step, warm)
        torchs.step()
    checkpoint = copy.deepcopy(torchs.state_dict())

    def resume(optimizer, dtype):
        ps = [torch.nn.Parameter(p.detach().to(dtype)) for p in warm]
        o = optimizer(ps, **kwargs)
        o.load_state_dict(copy.deepcopy(checkpoint))
        for p, q in zip(ps, warm, strict=True):
            p.grad = (q.detach() * 0.5 + 0.25).to(dtype)
        o.step()
        return ps

    ours = resume(getattr(fastnn.optim, name), dtype)
    theirs = resume(reference(name), dtype)
    exact = resume(reference(name), torch.float64)
    for p, q, r in zip(ours, theirs, exact, strict=True):
        assert p.dtype == dtype
        error = (p.double() - r).abs().max()
        assert error <= (q.double() - r).abs().max() + torch.finfo(dtype).eps * r.abs().max()
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_nothing(name):
    shapes = [(300_000,), (7,), (100_001,), (33, 77)]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            ps = parameters(shapes=shapes)
            optimizer = getattr(fastnn.optim, name)(ps, lr=1e-2, **FULL[name])
            for step in range(3):
                set_grads(step, ps)
                optimizer.step()
            results.append([p.detach() for p in ps])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity(name):
    ps, qs = parameters(shapes=[(40,)]), parameters(shapes=[(40,)])
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    for step in range(3):
        set_grads(step, ps, qs)
        for p in (ps[0], qs[0]):
            p.grad[3], p.grad[5 + step], p.grad[20] = torch.nan, torch.inf, 0
        ours.step()
        torchs.step()
    torch.testing.assert_close(ps[0].detach(), qs[0].detach(), equal_nan=True)


# ---- layouts -------------------------------------------------------------------------------------------------------


def strided(shape, layout, generator):
    """Random values in the given memory order: a permutation of the dimensions, or every second element."""
    values = torch.randn(shape, generator=generator)
    if layout == "gaps":
        holder = torch.zeros(*shape[:-1], 2 * shape[-1])
        view = holder[..., ::2]
    else:
        order = sorted(range(len(shape)), key=lambda d: layout[d])
        inverse = [order.index(d) for d in range(len(shape))]
        view = torch.zeros([shape[d] for d in order]).permute(inverse)
    return view.copy_(values)


layouts = st.one_of(st.just("gaps"), st.permutations(range(4)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    shapes=st.lists(st.tuples(*[st.integers(1, 5)] * 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_shapes_and_strides(name, shapes, data):
    generator = torch.Generator().manual_seed(3)
    ps = [torch.nn.Parameter(strided(s, data.draw(layouts), generator)) for s in shapes]
    qs = [torch.nn.Parameter(p.detach().contiguous()) for p in ps]
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    for step in range(3):
        if step == 2:  # the state's layout no longer follows the parameter's
            for p in ps:
                for key, value in ours.state[p].items():
                    if value.dim():
                        ours.state[p][key] = strided(value.shape, data.draw(layouts), generator).copy_(value)
        for p, q in zip(ps, qs, strict=True):
            p.grad = strided(p.shape, data.draw(layouts), generator)
            q.grad = p.grad.contiguous()
        ours.step()
        torchs.step()
    assert_same(ps, qs)
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_weights(name):
    def network():
        torch.manual_seed(1)
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        return layers.to(memory_format=torch.channels_last)

    a, b = network(), network()
    ours, torchs = pair(name, a.parameters(), b.parameters(), lr=1e-2, **FULL[name])
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    for _ in range(5):
        for net, optimizer in ((a, ours), (b, torchs)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert_same(a.parameters(), b.parameters())
    assert a[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_state(ours, torchs)
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_share_memory(name):
    def shared():
        big = torch.randn(50_000, generator=torch.Generator().manual_seed(4))
        return [torch.nn.Parameter(big), torch.nn.Parameter(big[10_000:])]

    ps, qs = shared(), shared()
    assert ps[1].data_ptr() == ps[0][10_000:].data_ptr()
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    for step in range(3):
        set_grads(step, ps, qs)
        ours.step()
        torchs.step()
    assert_same(ps, qs)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["torch to fastnn", "fastnn to torch"])
def test_checkpoints_continue(name, direction):
    ps, qs = parameters(), parameters()
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    for step in range(5):
        set_grads(step, ps, qs)
        ours.step()
        torchs.step()
    source, target_class, start = (
        (torchs, getattr(fastnn.optim, name), qs) if direction == "torch to fastnn"
        else (ours, reference(name), ps)
    )
    rs = [torch.nn.Parameter(p.detach().clone()) for p in start]
    target = target_class(rs, lr=0.5)
    target.load_state_dict(pickle.loads(pickle.dumps(source.state_dict())))
    for step in range(5, 10):
        set_grads(step, ps, qs, rs)
        for optimizer in (ours, torchs, target):
            optimizer.step()
    assert_same(ps, qs)
    assert_same(rs, qs)
    assert_same_state(target, source)
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_pickle_and_deepcopy(name):
    for clone in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        ps, qs = parameters(), parameters()
        ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
        for step in range(6):
            if step == 3:
                ours = clone(ours)
                ps = ours.param_groups[0]["params"]
            set_grads(step, ps, qs)
            ours.step()
            torchs.step()
        assert_same(ps, qs)


# ---- how step() is used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_closure(name):
    ps, qs = parameters(shapes=[(5, 3)]), parameters(shapes=[(5, 3)])
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])

    def closure(optimizer, p):
        def loss():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            value = (p.square() * 0.5).sum()
            value.backward()
            return value

        return loss

    for _ in range(5):
        with torch.no_grad():
            loss = ours.step(closure(ours, ps[0]))
        torch.testing.assert_close(loss, torchs.step(closure(torchs, qs[0])))
    assert_same(ps, qs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_scheduler_is_heard(name, tensor):
    ps, qs = parameters(), parameters()
    lr = [torch.tensor(0.1, dtype=torch.float64) for _ in range(2)] if tensor else [0.1, 0.1]
    ours = getattr(fastnn.optim, name)(ps, lr=lr[0], **FULL[name])
    torchs = reference(name)(qs, lr=lr[1], **FULL[name])
    momentum = not tensor and not {"momentum", "betas"}.isdisjoint(ours.defaults)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=momentum)
                  for o in (ours, torchs)]
    for step in range(20):
        set_grads(step, ps, qs)
        ours.step()
        torchs.step()
        for s in schedulers[: 2 if step < 19 else 0]:
            s.step()
    assert_same(ps, qs)
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_tensor_learning_rates(name):
    for lr in (torch.tensor(0.01), torch.tensor([0.01]), torch.tensor(0.01, dtype=torch.float64)):
        ps, qs = parameters(), parameters()
        ours, torchs = pair(name, ps, qs, lr=lr, **FULL[name])
        for step in range(20):
            if step == 10:
                lr.mul_(0.5)
            set_grads(step, ps, qs)
            ours.step()
            torchs.step()
        assert_same(ps, qs)
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_missing_gradients_and_groups(name):
    ps, qs = parameters(), parameters()
    groups = [[{"params": x[:2], "lr": 0.1}, {"params": x[2:], "weight_decay": 0.2}] for x in (ps, qs)]
    ours, torchs = pair(name, *groups, lr=1e-2, **FULL[name])
    extra = parameters(seed=9), parameters(seed=9)
    for step in range(12):
        if step == 6:
            ours.add_param_group({"params": extra[0]})
            torchs.add_param_group({"params": extra[1]})
        set_grads(step, [*ps, *extra[0]], [*qs, *extra[1]])
        for x in (ps, qs):
            x[step % len(x)].grad = None  # counters part
            if step < 4:
                x[4].grad = None  # state begins late
        ours.step()
        torchs.step()
    assert_same([*ps, *extra[0]], [*qs, *extra[1]])
    assert_same_state(ours, torchs)
    for p in ps:
        p.grad = None
    for p in extra[0]:
        p.grad = None
    before = [p.detach().clone() for p in ps]
    ours.step()  # nothing to do
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_goes_stale(name):
    """Data, gradients, state and options replaced between steps, behind autograd's back."""
    ps, qs = parameters(), parameters()
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    for step in range(12):
        set_grads(step, ps, qs)
        for xs, o in ((ps, ours), (qs, torchs)):
            if step == 3:
                for x in xs:
                    x.data = x.detach() * 2
            if step == 5:
                o.param_groups[0]["weight_decay"] = 0.3
                xs[1].data.fill_(0.25)
            if step == 7:
                for x in xs:
                    for key, value in o.state[x].items():
                        o.state[x][key] = value.clone()
            if step == 9:
                o.state.clear()
        ours.step()
        torchs.step()
    assert_same(ps, qs)
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_hooks_and_counts(name):
    ps = parameters()
    optimizer = getattr(fastnn.optim, name)(ps, lr=1e-2, **FULL[name])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    set_grads(0, ps)
    optimizer.step()
    scheduler.step()  # warns when step() was not counted
    ps[0].grad = ps[0].grad.to_sparse()
    try:
        optimizer.step()  # torch's own step runs inside: the hooks must not run twice
    except RuntimeError:
        calls.append("post")
    assert calls == ["pre", "post"] * 2
    with torch.profiler.profile() as profile:
        set_grads(1, ps)
        optimizer.step()
        plain = getattr(fastnn.optim, name)(ps, lr=1e-2)
        plain.step()
    counts = {e.key: e.count for e in profile.key_averages()}
    assert counts[f"Optimizer.step#{name}.step"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_global_hooks_and_subclasses(name):
    calls = []

    class Sub(getattr(fastnn.optim, name)):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    class Heir(getattr(fastnn.optim, name)):
        pass

    handles = [register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
               register_optimizer_step_post_hook(lambda *_: calls.append("post"))]
    try:
        for kind, expected in ((Sub, ["pre", "step", "post"]), (Heir, ["pre", "post"]),
                               (getattr(fastnn.optim, name), ["pre", "post"])):
            ps = parameters()
            optimizer = kind(ps, lr=1e-2)
            set_grads(0, ps)
            before = ps[0].detach().clone()
            optimizer.step()
            assert not torch.equal(before, ps[0])
            assert calls == expected
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_versions_are_bumped(name):
    """A parameter changed by step() between forward and backward is an error, as with torch."""
    p = torch.nn.Parameter(torch.randn(3))
    optimizer = getattr(fastnn.optim, name)([p], lr=0.1, **FULL[name])
    y = (p * p).sum()
    p.grad = torch.randn(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_grad_scaler(name, fused):
    if fused and name not in ("Adam", "AdamW", "SGD", "Adagrad"):
        fused = None
    kwargs = {"lr": 1e-2, **FULL[name], **({"fused": True} if fused else {})}
    ps, qs = parameters(), parameters()
    ours, torchs = pair(name, ps, qs, **kwargs)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        for scaler, optimizer, xs in zip(scalers, (ours, torchs), (ps, qs), strict=True):
            optimizer.zero_grad()
            scale = torch.inf if step == 3 else 1.0
            scaler.scale(sum((x * x.detach()).sum() for x in xs) * scale).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_same(ps, qs)


# ---- what goes to torch's own step -----------------------------------------------------------------------------------


def run_twice(name, make, kwargs=None, steps=3):
    ps, qs = make(), make()
    ours, torchs = pair(name, ps, qs, **{"lr": 1e-2, **(kwargs or {})})
    for step in range(steps):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q) or (name == "Yogi" and torch.allclose(p, q))
    assert sum(fastnn.fallbacks(clear=True).values()) == steps


@pytest.mark.parametrize("name", NAMES)
def test_fallbacks_are_torchs(name):
    run_twice(name, lambda: parameters(torch.complex64))
    run_twice(name, lambda: [*parameters(torch.float32), *parameters(torch.complex64)])

    class Subclass(torch.nn.Parameter):
        pass

    run_twice(name, lambda: [Subclass(torch.arange(3.0))])
    if name in ("Adam", "AdamW"):
        run_twice(name, lambda: parameters(), {"betas": (torch.tensor(0.9), torch.tensor(0.99))})


@pytest.mark.parametrize("name", NAMES)
def test_disabled(name):
    ps, qs = parameters(), parameters()
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    for step in range(4):
        set_grads(step, ps, qs)
        with fastnn.disabled() if step % 2 else contextlib.nullcontext():
            ours.step()
        torchs.step()
    with fastnn.disabled():
        set_grads(9, ps, qs)
        assert torch.equal(fastnn.clip_grad_norm_(ps, 0.1), torch.nn.utils.clip_grad_norm_(qs, 0.1))
    assert_same(ps, qs)
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"SGD", "Adagrad"}))
def test_sparse_gradients_are_refused(name):
    errors = []
    for optimizer in pair(name, parameters(shapes=[(5, 3)]), parameters(shapes=[(5, 3)])):
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.eye(5, 3).to_sparse()
        with pytest.raises(RuntimeError, match="sparse") as error:
            optimizer.step()
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_sgd_takes_sparse_gradients():
    ps, qs = parameters(shapes=[(5, 3)]), parameters(shapes=[(5, 3)])
    ours, torchs = pair("SGD", ps, qs, lr=0.1)
    for optimizer, p in ((ours, ps[0]), (torchs, qs[0])):
        p.grad = torch.eye(5, 3).to_sparse()
        optimizer.step()
    assert torch.equal(ps[0], qs[0])
    assert fastnn.fallbacks() == {("SGD.step", "layout"): 1}


def test_differentiable_keeps_the_graph():
    lr = torch.tensor(0.1, requires_grad=True)
    for name in ("SGD", "Adam"):
        p = torch.randn(3).requires_grad_()
        x = p.clone()
        optimizer = getattr(fastnn.optim, name)([x], lr=lr if name == "SGD" else 0.1, differentiable=True)
        x.grad = torch.ones(3)
        optimizer.step()
        assert torch.autograd.grad(x.sum(), p)[0].abs().sum() > 0
        assert fastnn.fallbacks(clear=True)


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_torchs(name):
    ours, torchs = getattr(fastnn.optim, name), reference(name)
    for kwargs in ({"lr": -1}, {"lr": torch.ones(2)}, {"weight_decay": -1}, {"nonsense": 1}, {"lr": "x"}):
        errors = []
        for optimizer in (ours, torchs):
            with pytest.raises(Exception) as error:  # noqa: PT011 - whatever torch raises
                optimizer(parameters(), **kwargs)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]
    errors = []
    for optimizer in (ours, torchs):  # an expanded parameter cannot be written
        p = torch.nn.Parameter(torch.ones(1).expand(3))
        p.grad = torch.ones(3)
        o = optimizer([p], lr=0.1)
        with pytest.raises(RuntimeError) as error:
            o.step()
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    errors = []
    for optimizer in (ours, torchs):
        o = optimizer(parameters(), lr=0.1)
        o.param_groups[0]["lr"] = "high"
        set_grads(0, o.param_groups[0]["params"])
        with pytest.raises((TypeError, ValueError)) as error:
            o.step()
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    ps, qs = parameters(shapes=[(5, 3)]), parameters(shapes=[(5, 3)])
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    compiled = torch.compile(ours.step, backend="eager")
    for step in range(3):
        set_grads(step, ps, qs)
        compiled()
        torchs.step()
    assert_same(ps, qs)


def test_subclass_and_repr():
    for name in set(NAMES) - {"Yogi"}:
        ours, torchs = pair(name, parameters(), parameters(), lr=0.1)
        assert isinstance(ours, getattr(torch.optim, name))
        assert repr(ours) == repr(torchs)


# ---- the ops ---------------------------------------------------------------------------------------------------------


def op_arguments(op):
    def make():
        return [torch.rand(3, 2), torch.rand(5)]

    steps = [torch.tensor(2.0), torch.tensor(0.0, dtype=torch.float64)]
    return {
        "adam_step_": lambda: (make(), make(), make(), make(), make(), steps, 0.1, 0.9, 0.99, 1e-8, 0.1, False, False),
        "yogi_step_": lambda: (make(), make(), make(), make(), steps, 0.1, 0.9, 0.99, 1e-3, 0.1, False),
        "sgd_step_": lambda: (make(), make(), make(), 0.1, 0.9, 0.1, 0.1, False, True, False),
        "adagrad_step_": lambda: (make(), make(), make(), steps, 0.1, 0.1, 1e-8, 0.1, False),
        "rmsprop_step_": lambda: (make(), make(), make(), make(), [], steps, 0.1, 0.9, 1e-8, 0.1, 0.9, False),
        "adadelta_step_": lambda: (make(), make(), make(), make(), steps, 0.1, 0.9, 1e-8, 0.1, False),
    }[op]()


OPS = ["adam_step_", "yogi_step_", "sgd_step_", "adagrad_step_", "rmsprop_step_", "adadelta_step_"]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.fastnn, op).default, op_arguments(op))


@pytest.mark.parametrize("op", OPS)
def test_op_refuses(op):
    function = getattr(torch.ops.fastnn, op)
    params, grads, *rest = op_arguments(op)
    with pytest.raises(RuntimeError, match="different lengths"):
        function(params, grads[:1], *rest)
    with pytest.raises(RuntimeError, match="mixed shapes"):
        function(params, [g.t() if g.dim() == 2 else g for g in grads], *rest)
    with pytest.raises(RuntimeError, match="mixed dtypes"):
        function(params, [g.double() for g in grads], *rest)
    with pytest.raises(RuntimeError, match="dtype"):
        function([p.int() for p in params], [g.int() for g in grads], *rest)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        function([p.requires_grad_() for p in params], grads, *rest)
