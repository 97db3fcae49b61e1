"""fastnn.optim against torch.optim: the same updates, option by option, for any parameters."""

import copy

import pytest
import torch
from compare import assert_same_bits_for_every_thread_count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizers import (
    CASES,
    DTYPES,
    FULL,
    NAMES,
    assert_same,
    assert_same_state,
    name_of,
    pair,
    parameters,
    reference,
    set_grads,
    step_together,
)

import fastnn

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

    def steps():
        ps = parameters(shapes=shapes)
        optimizer = getattr(fastnn.optim, name)(ps, lr=1e-2, **FULL[name])
        for step in range(3):
            set_grads(step, ps)
            optimizer.step()
        return [p.detach() for p in ps]

    assert_same_bits_for_every_thread_count(steps)


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
        step_together(step, ours, torchs)
    assert_same(ps, qs)
