"""How optimizers are used: checkpoints, closures, schedulers, hooks, what goes to torch, and the ops themselves."""

import contextlib
import copy
import pickle
import sys

import pytest
import torch
from optimizers import (
    FULL,
    NAMES,
    assert_same,
    assert_same_state,
    pair,
    parameters,
    reference,
    set_grads,
    step_together,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import fastnn

# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["torch to fastnn", "fastnn to torch"])
def test_checkpoints_continue(name, direction):
    ps, qs = parameters(), parameters()
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    for step in range(5):
        step_together(step, ours, torchs)
    source, target_class, start = (
        (torchs, getattr(fastnn.optim, name), qs) if direction == "torch to fastnn" else (ours, reference(name), ps)
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
            step_together(step, ours, torchs)
        assert_same(ps, qs)


# ---- how step() is used --------------------------------------------------------------------------------------------


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
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=momentum)
        for o in (ours, torchs)
    ]
    for step in range(20):
        step_together(step, ours, torchs)
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
            step_together(step, ours, torchs)
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
def test_state_in_another_order(name):
    """State found by parameter, wherever it stands in the dictionary and whatever else does."""
    ps, qs = parameters(), parameters()
    ours, torchs = pair(name, ps, qs, lr=1e-2, **FULL[name])
    for step in range(5):
        set_grads(step, ps, qs)
        if step == 2:
            for x, o in ((ps, ours), (qs, torchs)):
                entries = [(x[i], o.state.pop(x[i])) for i in (3, 5, 0, 1, 4, 2)]
                o.state[torch.nn.Parameter(torch.zeros(3))] = {}  # nobody's
                o.state.update(entries)
        if step == 4:
            for x in (ps, qs):
                x[3].grad = x[0].grad = None
        ours.step()
        torchs.step()
    assert_same(ps, qs)
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("elements", [1000, 600_000])
def test_nothing_is_kept(name, elements):
    """Short steps borrow their tensors from Python, long ones share them: both leave every count as it was."""
    ps = [torch.nn.Parameter(torch.ones(n)) for n in (elements, 7)]
    ours, _ = pair(name, [{"params": [p]} for p in ps], [torch.nn.Parameter(torch.ones(1))], lr=1e-2, **FULL[name])
    for step in range(3):
        for p in ps:
            p.grad = torch.full_like(p, step + 1)
        ours.step()
    tensors = [*ps, *(p.grad for p in ps), *(t for s in ours.state.values() for t in s.values() if torch.is_tensor(t))]
    counts = [(sys.getrefcount(t), t._use_count()) for t in tensors]
    for watched in (contextlib.nullcontext(), FlopCounterMode(display=False), contextlib.nullcontext()):
        with watched:
            ours.step()
    assert [(sys.getrefcount(t), t._use_count()) for t in tensors] == counts
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_runs_python(name):
    """Asked for its truth, the second group's takes the first group's parameter away: what is there then is stepped."""

    def parameter():
        p = torch.nn.Parameter(torch.ones(1000))
        p.grad = torch.ones_like(p)
        return p

    old, other, new = parameter(), parameter(), parameter()
    optimizer = getattr(fastnn.optim, name)([{"params": [old]}, {"params": [other]}], lr=1e-2, **FULL[name])
    optimizer.step()
    before = old.detach().clone()
    optimizer.state[new] = optimizer.state.pop(old)
    del old

    class Replaces:
        def __bool__(self):
            optimizer.param_groups[0]["params"][0] = new
            return False

    optimizer.param_groups[1]["maximize"] = Replaces()
    optimizer.step()
    assert not new.detach().eq(1).any() and not other.detach().eq(before).any()
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

    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        for kind, expected in (
            (Sub, ["pre", "step", "post"]),
            (Heir, ["pre", "post"]),
            (getattr(fastnn.optim, name), ["pre", "post"]),
        ):
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
@pytest.mark.parametrize("of", ["parameter", "state"])
def test_tensors_of_inference_mode_are_stepped_inside_of_it_alone(name, of):
    """What is made there may not be written outside, and is left as torch's refusal leaves it."""
    answers = []
    for kind in (getattr(fastnn.optim, name), reference(name)):
        with torch.inference_mode(of == "parameter"):
            p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        with torch.inference_mode():
            optimizer = kind([p], lr=1e-2, **FULL[name])
            optimizer.step()
            assert fastnn.fallbacks() == {}
        with pytest.raises(RuntimeError, match="outside InferenceMode") as refusal:
            optimizer.step()
        answers.append((str(refusal.value), p.detach().clone(), list(optimizer.state[p].values())))
        fastnn.fallbacks(clear=True)
    assert answers[0][0] == answers[1][0]
    torch.testing.assert_close(answers[0][1:], answers[1][1:])


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


@pytest.mark.parametrize(
    ("name", "fused"),
    [*((name, {}) for name in NAMES), *((name, {"fused": True}) for name in ("Adam", "AdamW", "SGD", "Adagrad"))],
)
def test_grad_scaler(name, fused):
    kwargs = {"lr": 1e-2, **FULL[name], **fused}
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


# ---- what goes to torch's own step ---------------------------------------------------------------------------------


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


# ---- the ops -------------------------------------------------------------------------------------------------------


def two():
    return [torch.rand(3, 2), torch.rand(5)]


def counters():
    return [torch.tensor(2.0), torch.tensor(0.0, dtype=torch.float64)]


# op: its arguments, which are lists of parameters, gradients and states, the steps made, and options
OPS = {
    "adam_step_": lambda: (two(), two(), two(), two(), two(), counters(), 0.1, 0.9, 0.99, 1e-8, 0.1, False, False),
    "yogi_step_": lambda: (two(), two(), two(), two(), counters(), 0.1, 0.9, 0.99, 1e-3, 0.1, False),
    "sgd_step_": lambda: (two(), two(), two(), 0.1, 0.9, 0.1, 0.1, False, True, False),
    "adagrad_step_": lambda: (two(), two(), two(), counters(), 0.1, 0.1, 1e-8, 0.1, False),
    "rmsprop_step_": lambda: (two(), two(), two(), two(), [], counters(), 0.1, 0.9, 1e-8, 0.1, 0.9, False),
    "adadelta_step_": lambda: (two(), two(), two(), two(), counters(), 0.1, 0.9, 1e-8, 0.1, False),
}


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.fastnn, op).default, OPS[op]())


@pytest.mark.parametrize("op", OPS)
def test_op_refuses(op):
    function = getattr(torch.ops.fastnn, op)
    params, grads, *rest = OPS[op]()
    with pytest.raises(RuntimeError, match="different lengths"):
        function(params, grads[:1], *rest)
    if op != "sgd_step_":  # without momentum it has no other lists
        for i in (0, [isinstance(a, list) for a in rest].index(False) - 1):  # the first state, and the counters
            with pytest.raises(RuntimeError, match="different lengths"):
                function(params, grads, *rest[:i], [], *rest[i + 1 :])
    with pytest.raises(RuntimeError, match="mixed shapes"):
        function(params, [g.t() if g.dim() == 2 else g for g in grads], *rest)
    with pytest.raises(RuntimeError, match="mixed dtypes"):
        function(params, [g.double() for g in grads], *rest)
    with pytest.raises(RuntimeError, match="dtype"):
        function([p.int() for p in params], [g.int() for g in grads], *rest)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        function([p.requires_grad_() for p in params], grads, *rest)
