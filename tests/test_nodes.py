"""The autograd nodes of the ops behave as torch's own: errors, hooks, undefined gradients, compiled autograd."""

import pytest
import torch
import torch.nn.functional as F

import fastnn

CALLS = {
    "relu": lambda f, x, w: f.relu(x),
    "relu6": lambda f, x, w: f.relu6(x),
    "leaky_relu": lambda f, x, w: f.leaky_relu(x, 0.2),
    "gelu": lambda f, x, w: f.gelu(x),
    "softmax": lambda f, x, w: f.softmax(x, 1),
    "log_softmax": lambda f, x, w: f.log_softmax(x, 1),
    "linear": lambda f, x, w: f.linear(x, w.flatten()[:32].view(4, 8)),
    "mm": lambda f, x, w: (torch.mm if f is F else f.mm)(x.view(-1, 8), w.flatten()[:32].view(8, 4)),
    "bmm": lambda f, x, w: (torch.bmm if f is F else f.bmm)(x.view(6, 8, 8), w.flatten()[:96].view(6, 8, 2)),
    "matmul": lambda f, x, w: (torch.matmul if f is F else f.matmul)(x, w.flatten()[:48].view(3, 8, 2)),
    "addmm": lambda f, x, w: (torch.addmm if f is F else f.addmm)(
        w[:, 0, 0, 0], x.view(-1, 8), w.flatten()[:32].view(8, 4), alpha=2
    ),
    "conv2d": lambda f, x, w: f.conv2d(x, w, padding=1),
    "max_pool2d": lambda f, x, w: f.max_pool2d(x, 3, 2, 1),
    "avg_pool2d": lambda f, x, w: f.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive_max_pool2d": lambda f, x, w: f.adaptive_max_pool2d(x, 3),
    "adaptive_avg_pool2d": lambda f, x, w: f.adaptive_avg_pool2d(x, 3),
    "batch_norm": lambda f, x, w: f.batch_norm(x, None, None, w[0, :, 0, 0], None, True),
    "cross_entropy": lambda f, x, w: f.cross_entropy(x, x.detach().argmin(1)),
    "nll_loss": lambda f, x, w: f.nll_loss(x, x.detach().argmin(1)),
}
PRODUCTS = {"linear", "mm", "bmm", "matmul", "addmm"}
SAVES_INPUT = {"leaky_relu", "gelu", "conv2d", "batch_norm"} | PRODUCTS


def tensors():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 8, 8, generator=g), torch.randn(4, 3, 3, 3, generator=g)
    return x.requires_grad_(), w.requires_grad_()


def run(f, call, backward=lambda loss: loss.backward()):
    x, w = tensors()
    y = call(f, x, w)
    backward((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum())
    return [t.grad for t in (x, w) if t.grad is not None]


@pytest.mark.parametrize("name", CALLS)
def test_compiled_autograd(name):
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()

    def backward(loss):
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()

    ours = run(fastnn.functional, CALLS[name], backward)
    for a, b in zip(ours, run(F, CALLS[name]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_second_backward_is_refused(name):
    x, w = tensors()
    y = CALLS[name](fastnn.functional, x * 1, w)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("name", sorted(SAVES_INPUT))
def test_changed_input_is_refused(name):
    x, w = tensors()
    x = x * 1
    y = CALLS[name](fastnn.functional, x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensor_hooks(name):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        ours, torchs = run(fastnn.functional, CALLS[name]), run(F, CALLS[name])
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_frozen_input(name):
    x, w = tensors()
    x.requires_grad_(False)
    y = CALLS[name](fastnn.functional, x, w)
    assert y.requires_grad == (name in PRODUCTS | {"conv2d", "batch_norm"})
    if y.requires_grad:
        (ours,) = torch.autograd.grad(y.sum(), w)
        (torchs,) = torch.autograd.grad(CALLS[name](F, x, w).sum(), w)
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("each", [True, False], ids=["of each", "of all"])
def test_second_derivatives_of_no_images(each):
    """torch's are none or zeros, depending on whether the gradients are taken together."""
    found = []
    for f in (fastnn.functional, F):
        x, w = torch.randn(0, 3, 8, 8, requires_grad=True), tensors()[1]
        y = CALLS["conv2d"](f, x, w)
        seed = torch.ones_like(y, requires_grad=True)
        first = torch.autograd.grad(y, (x, w), seed, create_graph=True)
        options = {"retain_graph": True, "allow_unused": True}
        if each:
            second = [torch.autograd.grad(g.sum(), (seed, x, w), **options) for g in first]
        else:
            second = torch.autograd.grad(first, (seed, x, w), [torch.ones_like(g) for g in first], **options)
        found.append((first, second))
    torch.testing.assert_close(*found)


def test_deep_graph_is_freed():
    x = torch.randn(4, requires_grad=True)
    y = x
    for _ in range(30000):
        y = fastnn.functional.relu(y)
    del y
    assert x.grad is None


def test_names_the_op():
    x, w = tensors()
    for name, call in CALLS.items():
        assert call(fastnn.functional, x, w).grad_fn.name() in name
