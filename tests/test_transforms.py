"""torch.func's transforms, forward-mode differentiation and batched gradients, which torch's operators compute."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from cases import ALL, differentiable
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fastnn

SMALL = [c for c in ALL if "big" not in c.tags]


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3),
        nn.GELU(), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d((2, 1)), nn.Tanh(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 5), nn.LeakyReLU(), nn.Sigmoid(), nn.LogSoftmax(1),
    ).double()  # fmt: skip


@pytest.fixture
def pair():
    """The network in torch.nn and in fastnn, with the same weights and lively statistics."""
    plain = network()
    plain(torch.randn(8, 1, 12, 12, dtype=torch.float64))
    fast = fastnn.convert(plain.eval(), inplace=False)
    return plain, fast


x = torch.randn(4, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
y = torch.tensor([0, 4, 2, 2])


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model):
    criterion = fastnn.CrossEntropyLoss() if type(model[0]) is fastnn.Conv2d else nn.CrossEntropyLoss()
    return lambda p, image, label: criterion(functional_call(model, p, (image[None],)), label[None])


def stacked(model):
    return {name: torch.stack([t, 1.5 * t]) for name, t in parameters(model).items()}


def dual(model):
    with fwAD.dual_level():
        return fwAD.unpack_dual(model(fwAD.make_dual(x, x.flip(0))))


def dual_parameters(model):
    with fwAD.dual_level():
        p = {name: fwAD.make_dual(t, t.flip(0)) for name, t in parameters(model).items()}
        return fwAD.unpack_dual(functional_call(model, p, (x,)))


def forward_over_reverse(model):
    leaf = x.clone().requires_grad_()
    with fwAD.dual_level():
        out = model(fwAD.make_dual(leaf, x.flip(0)))
        return fwAD.unpack_dual(torch.autograd.grad(out.square().sum(), leaf)[0]).tangent


TRANSFORMS = {
    "grad": lambda m: grad(loss(m))(parameters(m), x[0], y[0]),
    "per-sample gradients": lambda m: vmap(grad(loss(m)), in_dims=(None, 0, 0))(parameters(m), x, y),
    "vmap over images": lambda m: vmap(lambda image: m(image[None]))(x),
    "vmap over models": lambda m: vmap(lambda p: functional_call(m, p, (x,)))(stacked(m)),
    "jvp": lambda m: jvp(m, (x,), (x.flip(0),)),
    "jacrev": lambda m: jacrev(m)(x[:1]),
    "jacfwd": lambda m: jacfwd(m)(x[:1]),
    "hessian": lambda m: hessian(lambda image: m(image).square().sum())(x[:1]),
    "dual numbers": dual,
    "dual parameters": dual_parameters,
    "forward over reverse": forward_over_reverse,
    "batched gradients": lambda m: torch.autograd.functional.jacobian(m, x[:2], vectorize=True),
    "double backward": lambda m: torch.autograd.functional.hvp(lambda t: m(t).square().sum(), x, x.flip(0)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform_of_a_network(pair, transform):
    theirs, ours = map(transform, pair)
    torch.testing.assert_close(ours, theirs)


def test_calls_under_a_transform_are_counted(pair):
    grad(loss(pair[1]))(parameters(pair[1]), x[0], y[0])
    counts = fastnn.fallbacks(clear=True)
    assert counts["conv2d", "torch.func transform"] == 2 and counts["batch_norm", "torch.func transform"] == 1
    dual(pair[1])
    assert fastnn.fallbacks()["linear", "forward-mode differentiation"] == 1


def called(function, case):
    """Its first result in float64, the inputs that take a gradient, and a generator."""
    args, kwargs = case.build(torch.float64)
    out = function(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    return out, differentiable(args, kwargs), torch.Generator().manual_seed(6)


@pytest.mark.parametrize("case", [c for c in SMALL if differentiable(*c.build(torch.float64))], ids=lambda c: c.name)
def test_a_tangent_of_the_output_gradient(case):
    """Gradients are linear in the output's: its tangent goes through them. torch has no formula for silu's."""
    out, inputs, generator = called(case.fast, case)
    v, tangent = (torch.randn(out.shape, generator=generator, dtype=out.dtype) for _ in range(2))
    expected = [torch.autograd.grad(out, inputs, seed, allow_unused=True, retain_graph=True) for seed in (v, tangent)]
    with fwAD.dual_level():
        got = torch.autograd.grad(out, inputs, fwAD.make_dual(v, tangent), allow_unused=True)
        got = [(None, None) if g is None else fwAD.unpack_dual(g) for g in got]
    torch.testing.assert_close(list(zip(*got, strict=True)), expected, equal_nan=True)


@pytest.mark.parametrize("case", [c for c in SMALL if differentiable(*c.build(torch.float64))], ids=lambda c: c.name)
def test_a_tangent_through_second_derivatives(case):
    """Gradients made with create_graph of a dual number remember it: so do their own derivatives."""
    results = []
    for function in (case.fast, case.reference):
        out, inputs, generator = called(function, case)
        v, tangent = (torch.randn(out.shape, generator=generator, dtype=out.dtype) for _ in range(2))
        with fwAD.dual_level():
            seed = fwAD.make_dual(v.requires_grad_(), tangent)
            once = torch.autograd.grad(out, inputs, seed, create_graph=True, allow_unused=True)
            once = [g for g in once if g is not None and g.requires_grad]
            cotangents = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in once]
            twice = torch.autograd.grad(once, [v, *inputs], cotangents, allow_unused=True) if once else ()
            results.append([(None, None) if g is None else fwAD.unpack_dual(g) for g in [*once, *twice]])
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_a_tangent_through_second_derivatives_of_fused_norms(with_residual, training):
    generator = torch.Generator().manual_seed(6)
    x, r, v, tangent, u = (torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(5))
    w, b, mean, var = (torch.rand(2, dtype=torch.float64, generator=generator) + 0.5 for _ in range(4))
    inputs = [t.requires_grad_() for t in (x, w, b, r)][: 3 + with_residual]
    results = []
    for fused in (True, False):
        arguments = mean.clone(), var.clone(), w, b
        if not fused:
            out = nn.functional.relu(nn.functional.batch_norm(x, *arguments, training=training) + r * with_residual)
        elif with_residual:
            out = fastnn.functional.batch_norm_add_relu(x, r, *arguments, training=training)
        else:
            out = fastnn.functional.batch_norm_relu(x, *arguments, training=training)
        with fwAD.dual_level():
            seed = fwAD.make_dual(v.requires_grad_(), tangent)
            once = torch.autograd.grad(out, inputs, seed, create_graph=True)
            twice = torch.autograd.grad((once[0] * u).sum() + once[1].sum(), [v, x, w])
            results.append([fwAD.unpack_dual(g) for g in [*once, *twice]])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", [c for c in SMALL if differentiable(*c.build(torch.float64))], ids=lambda c: c.name)
def test_a_tangent_of_the_second_cotangent(case):
    """A second derivative calls backward ops again: with a dual number they are torch's."""
    results = []
    for function in (case.fast, case.reference):
        out, inputs, generator = called(function, case)
        if out.numel() == 0:
            return

        def random(t, generator=generator):
            return torch.randn(t.shape, generator=generator, dtype=t.dtype)

        v = random(out).requires_grad_()
        once = torch.autograd.grad(out, inputs, v, create_graph=True, allow_unused=True)
        once = [g for g in once if g is not None and g.requires_grad]
        with fwAD.dual_level():
            seeds = [fwAD.make_dual(random(g), random(g)) for g in once]
            twice = torch.autograd.grad(once, [v, *inputs], seeds, allow_unused=True)
            results.append([(None, None) if g is None else fwAD.unpack_dual(g) for g in twice])
    torch.testing.assert_close(*results, equal_nan=True)


def test_a_dual_number_into_a_pooling_backward_op_raises():
    g = torch.ones(2, 3, 2, 2)
    with fwAD.dual_level(), pytest.raises(RuntimeError):
        torch.ops.fastnn.adaptive_avg_pool2d_backward(fwAD.make_dual(g, g), [4, 4], False)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_tangents_of_every_case(case):
    """Forward mode gives the tangents torch gives (NaN for neither), never zeros."""
    results = []
    for function in (case.fast, case.reference):
        args, kwargs = case.build(torch.float64)
        with fwAD.dual_level():
            generator = torch.Generator().manual_seed(6)

            def perturbed(v, generator=generator):
                if isinstance(v, torch.Tensor) and v.requires_grad:
                    v = v.detach()
                    return fwAD.make_dual(v, torch.randn(v.shape, generator=generator, dtype=v.dtype))
                return v

            try:
                out = function(*map(perturbed, args), **{k: perturbed(v) for k, v in kwargs.items()})
            except (RuntimeError, NotImplementedError) as error:  # torch has no formula for it: neither have we
                results.append(type(error))
                continue
            results.append(fwAD.unpack_dual(out[0] if isinstance(out, tuple) else out).tangent)
    ours, theirs = results
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("case", [c for c in SMALL if differentiable(*c.build(torch.float64))], ids=lambda c: c.name)
def test_batched_gradients_of_every_case(case):
    """torch.autograd.grad(is_grads_batched=True) runs the first backward, and the second, under a vmap of its own."""
    results = []
    for function in (case.fast, case.reference):
        out, inputs, generator = called(function, case)

        def batch_for(t, generator=generator):
            return torch.randn(2, *t.shape, generator=generator, dtype=t.dtype)

        first = torch.autograd.grad(
            out, inputs, batch_for(out), retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        v = torch.ones_like(out, requires_grad=True)
        once = [g for g in torch.autograd.grad(out, inputs, v, create_graph=True, allow_unused=True) if g is not None]
        seeds = list(map(batch_for, once))
        second = torch.autograd.grad(once, v, seeds, is_grads_batched=True, allow_unused=True, retain_graph=True)
        live = torch.autograd.grad(
            out, inputs, batch_for(out), create_graph=True, is_grads_batched=True, allow_unused=True
        )
        results.append((first, second, [g is not None and g.requires_grad for g in live]))
    torch.testing.assert_close(*results, equal_nan=True)
