"""fastnn.clip_grad_norm_ against torch.nn.utils.clip_grad_norm_."""

import math

import pytest
import torch
from compare import assert_same_bits_for_every_thread_count

import fastnn

SHAPES = [(3,), (17, 5), (4, 3, 3, 3), (), (40_000,), (16_384,)]


def parameters(dtype=torch.float32, shapes=SHAPES, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    ps = []
    for s in shapes:
        p = torch.nn.Parameter(torch.zeros(s, dtype=dtype))
        p.grad = (scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype)
        ps.append(p)
    return ps


def both(ps, qs, *args, **kwargs):
    a, b = fastnn.clip_grad_norm_(ps, *args, **kwargs), torch.nn.utils.clip_grad_norm_(qs, *args, **kwargs)
    assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
    return a, b


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1, math.inf, "inf"])
@pytest.mark.parametrize("max_norm", [0.1, 1e6, 0])
def test_against_float64(dtype, norm_type, max_norm, isa):
    fastnn._C.set_isa(isa)
    ps, qs = parameters(dtype, scale=0.1), parameters(dtype, scale=0.1)
    exact = [p.grad.double() for p in ps]
    values = torch.cat([g.flatten() for g in exact]).abs().tolist()
    if float(norm_type) == 2:
        truth = math.sqrt(math.fsum(v * v for v in values))
    else:
        truth = math.fsum(values) if norm_type == 1 else max(values)
    total, torchs = both(ps, qs, max_norm, norm_type)
    eps = torch.finfo(dtype).eps
    assert abs(total.item() - truth) <= 2 * abs(torchs.item() - truth) + 4 * eps * truth
    for p, q, g in zip(ps, qs, exact, strict=True):
        g = g * min(1, max_norm / (truth + 1e-6))
        error, allowed = (p.grad - g).abs().max(), (q.grad - g).abs().max()
        assert error <= 2 * allowed + 4 * eps * g.abs().max()
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("where", [0, 1, 39_999])
def test_nonfinite(bad, norm_type, where):
    ps, qs = parameters(), parameters()
    for xs in (ps, qs):
        xs[4].grad[where] = bad
    before = [p.grad.clone() for p in ps]
    messages = []
    for function, xs in ((fastnn.clip_grad_norm_, ps), (torch.nn.utils.clip_grad_norm_, qs)):
        with pytest.raises(RuntimeError) as error:
            function(xs, 1.0, norm_type, error_if_nonfinite=True)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    torch.testing.assert_close([p.grad for p in ps], before, rtol=0, atol=0, equal_nan=True)
    a, b = both(ps, qs, 1.0, norm_type)
    torch.testing.assert_close(a, b, equal_nan=True)
    torch.testing.assert_close([p.grad for p in ps], [q.grad for q in qs], equal_nan=True)


def test_layouts_threads_and_missing_gradients():
    def clipped():
        lists = []
        for _ in range(2):
            ps = parameters(shapes=[(8, 3, 5, 5), (90_001,), (6, 8)])
            ps[0].grad = ps[0].grad.to(memory_format=torch.channels_last)
            ps[2].grad = torch.arange(192.0).reshape(12, 16)[::2, ::2]
            ps.append(torch.nn.Parameter(torch.ones(2)))  # without a gradient
            lists.append(ps)
        torch.testing.assert_close(*both(*lists, 0.5))
        for p, q in zip(*lists, strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)
                assert p.grad.stride() == q.grad.stride()
        return [p.grad for p in lists[0][:3]]

    assert_same_bits_for_every_thread_count(clipped)
    assert fastnn.fallbacks() == {}


def test_one_tensor_generators_and_nothing():
    ps, qs = parameters(), parameters()
    torch.testing.assert_close(*both(ps[1], qs[1], 0.5))
    torch.testing.assert_close(*both((p for p in ps), (q for q in qs), 0.5))
    assert fastnn.clip_grad_norm_([], 1.0) == 0
    assert fastnn.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0) == 0
    with pytest.warns(UserWarning, match="empty generator"):
        assert fastnn.clip_grad_norm_((p for p in []), 1.0) == 0
    assert fastnn.fallbacks() == {}


def test_versions_are_bumped():
    ps = parameters()
    before = [p.grad._version for p in ps]
    fastnn.clip_grad_norm_(ps, 1e9)
    assert all(p.grad._version > v for p, v in zip(ps, before, strict=True))


@pytest.mark.parametrize(
    ("make", "norm_type"),
    [
        (lambda: parameters(), 3.0),
        (lambda: parameters(), 0.5),
        (lambda: parameters(torch.complex64), 2.0),
        (lambda: [*parameters(), *parameters(torch.float64)], 2.0),
    ],
)
def test_fallbacks_are_torchs(make, norm_type):
    ps, qs = make(), make()
    a, b = both(ps, qs, 0.5, norm_type)
    assert torch.equal(a, b)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ps, qs, strict=True))
    assert sum(fastnn.fallbacks().values()) == 1


def test_errors_are_torchs():
    for args in ((None,), ("x",), (1.0, "x")):
        errors = []
        for function in (fastnn.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            with pytest.raises((TypeError, ValueError)) as error:
                function(parameters(), *args)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]
    for shapes in ([(0,)], [(3,), (0, 2)]):
        errors = []
        for function in (fastnn.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            with pytest.raises(RuntimeError) as error:
                function(parameters(shapes=shapes), 1.0, math.inf)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_gradients_of_inference_mode_are_clipped_inside_of_it_alone():
    p = torch.nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        p.grad = torch.ones(3)
        fastnn.optim.clip_grad_norm_([p], 1.0)
        torch.testing.assert_close(p.grad.norm(), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        fastnn.optim.clip_grad_norm_([p], 0.1)


def test_opcheck():
    grads = [p.grad for p in parameters()]
    torch.library.opcheck(torch.ops.fastnn.grads_total_norm.default, (grads, 2.0))
    torch.library.opcheck(torch.ops.fastnn.scale_grads_.default, (grads, torch.tensor(7.0), 0.5))
    with pytest.raises(RuntimeError, match="mixed dtypes"):
        torch.ops.fastnn.grads_total_norm([grads[0], grads[1].double()], 2.0)
    with pytest.raises(RuntimeError, match="norm_type"):
        torch.ops.fastnn.grads_total_norm(grads, 3.0)
    with pytest.raises(RuntimeError, match="one element"):
        torch.ops.fastnn.scale_grads_(grads, torch.ones(2), 0.5)
