"""What the cases do not show of cross_entropy, nll_loss and softmax: memory, reuse, threads, modules, autocast."""

import math

import pytest
import torch
import torch.nn.functional as T
from compare import assert_same_bits_for_every_thread_count
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn import functional as F

LOSSES = [fastnn.functional.cross_entropy, fastnn.functional.nll_loss]


class Allocations(TorchDispatchMode):
    """Bytes of the storages that ops made, each counted once."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.storages[t.untyped_storage()._cdata] = (t.untyped_storage(), t.untyped_storage().nbytes())
        return out

    @property
    def bytes(self):
        return sum(size for _, size in self.storages.values())


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.1, "ignore_index": 3}, {"weight": torch.rand(4000)}])
def test_one_logits_sized_buffer(kwargs):
    x, target = torch.randn(64, 4000, requires_grad=True), torch.randint(4000, (64,))

    def allocated(function):
        with Allocations() as mode:
            torch.autograd.grad(function(x, target, **kwargs), x)
        return mode.bytes / (x.numel() * 4)

    assert allocated(F.cross_entropy) < 1.01
    assert allocated(F.cross_entropy) <= allocated(T.cross_entropy) / 2


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_backward_and_double_use(reduction):
    x, target = torch.randn(9, 33, dtype=torch.float64, requires_grad=True), torch.randint(33, (9,))
    loss = F.cross_entropy(x, target, reduction=reduction)
    reference = T.cross_entropy(x, target, reduction=reduction)
    for scale in (1.0, -2.5):
        seed = torch.full_like(loss, scale)
        (ours,) = torch.autograd.grad(loss, x, seed, retain_graph=True)
        (theirs,) = torch.autograd.grad(reference, x, seed, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("weight", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(37, 10), (40, 16), (19, 100), (33, 129), (2, 40000), (3, 21, 50, 41)], ids=str)
def test_gradient_that_came_with_the_loss(shape, reduction, weight):
    """Forward may have computed it: for every scale, in a kept graph, under hooks and in a mode it is the same."""
    x, target = torch.randn(shape, requires_grad=True), torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[::5] = 2
    kwargs = {"reduction": reduction, "ignore_index": 2, "weight": torch.rand(shape[1]) + 0.1 if weight else None}
    (expected,) = torch.autograd.grad(T.cross_entropy(x, target, **kwargs), x)

    def close(gradient, scale=1.0):
        torch.testing.assert_close(gradient, expected * scale, rtol=1e-4, atol=1e-6 * expected.abs().max().item())

    loss = F.cross_entropy(x, target, **kwargs)
    (kept,) = torch.autograd.grad(loss, x, retain_graph=True)
    (last,) = torch.autograd.grad(loss, x)
    close(kept), close(last)
    kept.zero_()
    close(last)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    for scale in (1.0, -2.5, 0.0):
        close(torch.autograd.grad(F.cross_entropy(x, target, **kwargs) * scale, x)[0], scale)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        close(torch.autograd.grad(F.cross_entropy(x, target, **kwargs), x)[0])
    with Allocations():
        close(torch.autograd.grad(F.cross_entropy(x, target, **kwargs), x)[0])
    seeds = torch.tensor([1.0, 3.0])
    (rows,) = torch.autograd.grad(F.cross_entropy(x, target, **kwargs), x, seeds, is_grads_batched=True)
    close(rows[0]), close(rows[1], 3.0)


def test_gradient_that_came_with_the_loss_is_freed():
    x, target = torch.randn(64, 4000, requires_grad=True), torch.randint(4000, (64,))
    with torch.profiler.profile(profile_memory=True) as profile:
        F.cross_entropy(x, target).backward()
    taken = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    assert x.numel() * 4 <= taken < 1.01 * x.numel() * 4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_is_changed_in_place(reduction):
    """The logits where their gradient did not come with the loss; the target always, as in torch."""
    changed = pytest.raises(RuntimeError, match="modified by an inplace operation")
    x, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, 2, 2])
    (expected,) = torch.autograd.grad(T.cross_entropy(x, target, reduction=reduction).sum(), x)

    logits = x * 1.0
    loss = F.cross_entropy(logits, target, reduction=reduction).sum()
    logits.detach().fill_(-math.inf)
    if reduction == "none":
        with changed:
            torch.autograd.grad(loss, x)
    else:
        torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
        with changed:
            torch.autograd.grad(loss, x, create_graph=True)

    loss = F.cross_entropy(x * 1.0, target, reduction=reduction).sum()
    target.zero_()
    with changed:
        loss.backward()


@pytest.mark.parametrize("shape", [(300, 10), (65, 1000), (2, 40000), (3, 21, 50, 41)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_every_thread_count(shape, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))

    def step():
        log_p = F.log_softmax(x, 1)
        losses = [F.cross_entropy(x, target, label_smoothing=0.1), F.nll_loss(log_p, target), F.softmax(x, 1).sum()]
        return [log_p, *losses, *(torch.autograd.grad(loss, x)[0] for loss in losses)]

    assert_same_bits_for_every_thread_count(step)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_layouts(loss, layout):
    reference = getattr(T, loss.__name__)
    if layout == "channels_last":
        x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = torch.randn(2, 7, 5).transpose(1, 2)
    else:
        x = torch.randn(2, 5, 1).expand(2, 5, 6)
    target = torch.randint(5, (2, *x.shape[2:]))
    ours, theirs = (v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in (x, x))
    (g,) = torch.autograd.grad(loss(ours, target), ours)
    # torch's own 4-D nll_loss raises in backward for channels_last.
    (e,) = torch.autograd.grad(reference(theirs.contiguous(), target), theirs)
    torch.testing.assert_close(g, e)
    if layout != "expanded":
        assert g.stride() == x.stride()
    assert fastnn.fallbacks() == {}


# Every input lies in memory of another order, with gaps or repeated; the last has more dimensions of rows than the
# kernels count and is copied.
STRIDED = {
    "transposed": lambda: torch.rand(7, 300).t(),
    "every other": lambda: torch.rand(300, 14)[:, ::2],
    "rows repeated": lambda: torch.rand(1, 7).expand(300, 7),
    "vector": lambda: torch.rand(21)[::3],
    "words": lambda: torch.rand(3, 50, 7)[:, :-1].transpose(1, 2),
    "images": lambda: torch.rand(3, 9, 12, 40)[:, 1:8, 2:, :-3],
    "images backwards": lambda: torch.rand(40, 12, 7, 3).permute(3, 2, 1, 0),
    "volumes": lambda: torch.rand(2, 7, 5, 8, 9)[:, :, ::2, :-1, ::2],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nll_loss_reads_rows_where_they_lie(view, reduction):
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)):
        x = view().to(dtype)
        classes = x.shape[0 if x.dim() == 1 else 1]
        target = torch.randint(classes, (x.shape[0], *x.shape[2:]) if x.dim() > 1 else ())
        weight, leaf, dense = torch.rand(classes).to(dtype), x.detach(), x.contiguous()
        losses = [F.nll_loss(v.requires_grad_(), target, weight, None, 2, None, reduction) for v in (leaf, dense)]
        grads = [torch.autograd.grad(y.sum(), v)[0] for y, v in zip(losses, (leaf, dense), strict=True)]
        torch.testing.assert_close(*losses, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(*grads)
        expected = T.nll_loss(x.double(), target, weight.double(), None, 2, None, reduction)
        torch.testing.assert_close(losses[0].double(), expected, rtol=rtol, atol=0, equal_nan=True)
    with pytest.raises(IndexError, match=f"Target {classes} is out of bounds"):
        F.nll_loss(x, torch.full_like(target, classes))
    assert fastnn.fallbacks() == {}


def test_nll_loss_copies_no_transposed_input():
    x = torch.rand(500, 400).t()
    with torch.profiler.profile(profile_memory=True) as profile:
        F.nll_loss(x, torch.randint(500, (400,)))
    assert sum(max(0, e.self_cpu_memory_usage) for e in profile.events()) < 1 << 16


def test_uint8_targets():
    x, target = torch.randn(6, 300), torch.tensor([0, 1, 255, 7, 100, 4], dtype=torch.uint8)
    for loss in LOSSES:
        torch.testing.assert_close(loss(x, target), getattr(T, loss.__name__)(x, target))
        torch.testing.assert_close(
            loss(x, target, ignore_index=7), getattr(T, loss.__name__)(x, target, ignore_index=7)
        )
    assert fastnn.fallbacks() == {}


@pytest.mark.parametrize("kwargs", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}])
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_arguments(kwargs):
    x, target = torch.randn(4, 5), torch.randint(5, (4,))
    for loss, module in zip(LOSSES, ("CrossEntropyLoss", "NLLLoss"), strict=True):
        expected = getattr(T, loss.__name__)(x, target, **kwargs)
        torch.testing.assert_close(loss(x, target, **kwargs), expected)
        torch.testing.assert_close(getattr(fastnn, module)(**kwargs)(x, target), expected)


def test_modules():
    x, target, weight = torch.randn(6, 5), torch.randint(5, (6,)), torch.rand(5)
    for name, extra in (("CrossEntropyLoss", {"label_smoothing": 0.2}), ("NLLLoss", {})):
        ours, theirs = (
            getattr(n, name)(weight=weight, ignore_index=2, reduction="sum", **extra) for n in (fastnn, torch.nn)
        )
        torch.testing.assert_close(ours(x, target), theirs(x, target))
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_autocast_computes_in_float32(loss):
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(5, (4,))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = loss(x, target), getattr(T, loss.__name__)(x, target)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.grad(ours, x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("shape", [(4, 6), (4, 200), (4, 6, 3), (4, 40, 17)], ids=str)
def test_infinite_and_nan_logits(value, shape):
    x = torch.randn(shape)
    x[1, 2] = value
    x[2] = value
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    for op in ("softmax", "log_softmax"):
        torch.testing.assert_close(getattr(F, op)(x, 1), getattr(T, op)(x, 1), equal_nan=True)
    ours, theirs = (f(x, target, reduction="none") for f in (F.cross_entropy, T.cross_entropy))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


# ---- exp and log, seen through softmax -----------------------------------------------------------------------------


def ulps(ours, exact):
    """Largest error in units in the last place of the exact value."""
    eps, tiny = torch.finfo(ours.dtype).eps, torch.finfo(ours.dtype).tiny
    exact = exact.to(torch.float64)
    unit = torch.exp2(exact.abs().clamp(min=tiny).log2().floor()) * eps
    return ((ours.double() - exact).abs() / unit).max().item()


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_exp_within_one_ulp(isa):
    fastnn._C.set_isa(isa)
    y = torch.empty(1 << 16, 2).uniform_(-87, 88)
    g = torch.tensor([0.0, 1.0]).expand_as(y).contiguous()
    e = -torch.ops.fastnn.log_softmax_backward(g, y, 1)[:, 0]  # g_0 - exp(y_0) sum(g) = -exp(y_0)
    # Two roundings per step in the baseline, one (FMA) elsewhere.
    assert ulps(e, y[:, 0].double().exp()) <= (1.0 if isa != "baseline" else 2.0)
    edge = torch.tensor([-math.inf, math.inf, math.nan, -200.0, 200.0, -100.0, 0.0])
    y = torch.stack([edge, torch.zeros(7)], 1)
    e = -torch.ops.fastnn.log_softmax_backward(g[:7].contiguous(), y, 1)[:, 0]
    torch.testing.assert_close(e, edge.exp(), equal_nan=True, rtol=1e-6, atol=2e-45)


@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_float64_exp_and_log(isa):
    fastnn._C.set_isa(isa)
    y = torch.empty(1 << 14, 2, dtype=torch.float64).uniform_(-700, 700)
    g = torch.tensor([0.0, 1.0], dtype=torch.float64).expand_as(y).contiguous()
    e = -torch.ops.fastnn.log_softmax_backward(g, y, 1)[:, 0]
    # libm's own exp is within one ulp of the truth.
    assert ulps(e, y[:, 0].exp()) <= (2.5 if isa != "baseline" else 4)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inner", [1, 19])
def test_log_within_one_ulp(isa, dtype, inner):
    fastnn._C.set_isa(isa)
    for n in [*range(1, 130), 1000, 4096, 99991]:
        ours = -F.log_softmax(torch.zeros(1, n, inner, dtype=dtype), 1)[0, 0]
        assert ulps(ours, torch.full_like(ours, math.log(n), dtype=torch.float64)) <= 1.5


# ---- classes in rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 5, 8, 9, 10, 16, 17, 24, 31, 33, 48, 64, 65, 80, 100, 127, 128, 129, 200])
def test_rows_of_every_length(classes, dtype, isa):
    """Whole and part groups of rows and vectors; rows that do not count and hold NaN have no gradient."""
    fastnn._C.set_isa(isa)
    close = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for rows in (1, 5, 16, 17, 50):
        x = (torch.randn(rows, classes) * 3).to(dtype)
        exact, target = x.double().requires_grad_(), torch.randint(classes, (rows,))
        target[::5] = 1
        logits = x.masked_fill((target == 1).unsqueeze(1), math.nan).requires_grad_()
        for op in ("softmax", "log_softmax"):
            torch.testing.assert_close(getattr(F, op)(x, 1).double(), getattr(T, op)(exact, 1).detach(), **close)
        for reduction in ("none", "mean", "sum"):
            if (target == 1).all() and reduction == "mean":
                continue
            kwargs = {"ignore_index": 1, "reduction": reduction}
            ours, theirs = F.cross_entropy(logits, target, **kwargs), T.cross_entropy(exact, target, **kwargs)
            torch.testing.assert_close(F.cross_entropy(logits.detach(), target, **kwargs), ours)
            torch.testing.assert_close(ours.double(), theirs, **close)
            (gradient,), (slope,) = (torch.autograd.grad(v.sum(), i) for v, i in ((ours, logits), (theirs, exact)))
            torch.testing.assert_close(gradient.double(), slope, **close)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("classes", [3, 10, 16, 40, 100, 300, 1001])
def test_rows_far_from_zero(classes, isa):
    """The exponentials less a maximum: of logits of any size, next to each other, down to what they are zero for."""
    fastnn._C.set_isa(isa)
    at = torch.tensor([0, 7.3, -50.7, 3e3, 16383, -16384, 16385, -2e4, 1e6, -3e9, 2e38, -3e38])
    depth = torch.tensor([1.0, 30.0, 80.0]).repeat_interleave(len(at)).unsqueeze(1)
    near = at.abs() < 1e5
    for rows in (at.repeat(3)[near.repeat(3)], at.repeat(3)):
        spread = depth[near.repeat(3)] if len(rows) < len(depth) else depth
        x = rows.unsqueeze(1) - spread * torch.rand(len(rows), classes)
        x[:, 1] = -math.inf
        x[::2, 0] = -1e30
        exact = x.double()
        for op in ("softmax", "log_softmax"):
            ours, theirs = getattr(F, op)(x, 1).double(), getattr(T, op)(exact, 1)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=4e-7 if op == "log_softmax" else 1e-38)
        target = x.argmax(1)
        for reduction in ("none", "sum"):
            ours, theirs = (v.requires_grad_() for v in (x.clone(), exact.clone()))
            losses = [
                f(v, target, reduction=reduction) for f, v in ((F.cross_entropy, ours), (T.cross_entropy, theirs))
            ]
            torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-6, atol=4e-7)
            gradients = [torch.autograd.grad(v.sum(), i)[0] for v, i in zip(losses, (ours, theirs), strict=True)]
            torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=2e-7)
    edge = torch.zeros(20, classes)
    edge[3], edge[5, 2], edge[7, 1], edge[11] = -math.inf, math.inf, math.nan, 3.0
    torch.testing.assert_close(F.softmax(edge, 1), T.softmax(edge, 1), equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(F.log_softmax(edge, 1), T.log_softmax(edge, 1), equal_nan=True, rtol=1e-6, atol=4e-7)


# ---- classes in the middle: strips of columns ------------------------------------------------------------------------


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("shape", [(2, 600, 530), (1, 2100, 49), (3, 5, 1100), (2, 9, 17), (70, 5, 4)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "weight", "smooth"])
def test_strips_of_columns(shape, kind, isa):
    """Narrow and wide strips, their ends, rows that do not count and hold NaN; the same bits for two threads."""
    fastnn._C.set_isa(isa)
    n, classes, inner = shape
    x, target = torch.randn(shape), torch.randint(classes, (n, inner))
    target[0, 3::7] = 2
    kwargs = {"ignore_index": 2}
    if kind == "weight":
        kwargs["weight"] = torch.rand(classes)
    if kind == "smooth":
        kwargs["label_smoothing"] = 0.1
    exact_kwargs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    for logits in (x, x.masked_fill((target == 2).unsqueeze(1), math.nan)):
        logits, exact = logits.clone().requires_grad_(), x.double().requires_grad_()
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = F.cross_entropy(logits, target, **kwargs)
            results.append((loss, torch.autograd.grad(loss, logits)[0]))
        torch.set_num_threads(1)
        expected = T.cross_entropy(exact, target, **exact_kwargs)
        torch.testing.assert_close(results[0][0].double(), expected, rtol=2e-6, atol=0)
        (slope,) = torch.autograd.grad(expected, exact)
        torch.testing.assert_close(results[0][1].double(), slope, rtol=1e-5, atol=1e-8)
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(64, 2, 2), (70, 16, 3), (100, 5, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_few_columns_without_gradients(shape, reduction, kind):
    n, classes, inner = shape
    x, target = torch.randn(shape), torch.randint(classes, (n, inner))
    weight, kwargs = torch.rand(classes), {"reduction": reduction}
    if kind == "probabilities":
        target = torch.randn(shape).softmax(1)
    else:
        kwargs["ignore_index"] = 1
    exact_target = target.double() if kind == "probabilities" else target
    ours = F.cross_entropy(x, target, weight, **kwargs)
    expected = T.cross_entropy(x.double(), exact_target, weight.double(), **kwargs)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("isa", fastnn._C.isas())
@pytest.mark.parametrize("at", [0, 13, 63, 64])
@pytest.mark.parametrize("value", [-1, 5, 1 << 32])
def test_class_out_of_range_anywhere_in_a_strip(value, at, isa):
    fastnn._C.set_isa(isa)
    target = torch.zeros(1, 65, dtype=torch.int64)
    target[0, at] = value
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(torch.randn(1, 5, 65), target)


@pytest.mark.parametrize("weight", [None, torch.rand(5).double(), torch.zeros(5).double()], ids=["", "weight", "zeros"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [[], [-100] * 3, [2, -100, 4]], ids=["empty", "ignored", "one ignored"])
def test_second_derivatives_where_rows_do_not_count(rows, reduction, smoothing, weight):
    target, found = torch.tensor(rows, dtype=torch.int64), []
    start = torch.randn(len(rows), 5, dtype=torch.float64)
    for f in (F, T):
        x = start.clone().requires_grad_()
        loss = f.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing)
        seed = torch.ones_like(loss, requires_grad=True)
        (grad,) = torch.autograd.grad(loss, x, seed, create_graph=True)
        found.append((grad, torch.autograd.grad(grad, (seed, x), torch.ones_like(grad))))
    torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "input", "target"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)], ids=str)
def test_second_derivatives_of_probabilities_without_rows(shape, wanted, reduction):
    """A mean of no rows is NaN, and its gradient no function of the output's."""
    found = []
    for f in (F, T):
        inputs = [torch.rand(shape, requires_grad=w) for w in wanted]
        loss = f.cross_entropy(*inputs, reduction=reduction)
        seed = torch.ones_like(loss, requires_grad=True)
        inputs = [t for t in inputs if t.requires_grad]
        grads = torch.autograd.grad(loss, inputs, seed, create_graph=True)
        recorded = [g.sum() for g in grads if g.requires_grad]
        second = torch.autograd.grad(recorded, [seed, *inputs], allow_unused=True) if recorded else ()
        found.append((grads, [t is None for t in second]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5, 0), (0,), (2, 0, 3)])
def test_no_classes(shape, reduction):
    x, target = torch.randn(shape, requires_grad=True), torch.rand(shape)
    for kwargs in ({}, {"weight": torch.rand(0)}, {"label_smoothing": 0.1}):
        ours, theirs = (f.cross_entropy(x, target, reduction=reduction, **kwargs) for f in (F, T))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert torch.autograd.grad(ours.sum(), x)[0].shape == shape


def test_backward_refuses_what_no_forward_saved():
    x, target, one = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), torch.tensor(1.0)
    for bad in [(x, target[:2], one), (x, target.int(), one), (x, target, one.double()), (x, target, torch.empty(0))]:
        with pytest.raises(RuntimeError, match="no forward call"):
            torch.ops.fastnn.nll_loss_backward(one, *bad[:2], None, bad[2], 1, -100)
    for bad in [(x, target[:2], torch.zeros(9)), (x, target, torch.zeros(9).double()), (x, target, torch.zeros(8))]:
        with pytest.raises(RuntimeError, match="another call|no forward call"):
            torch.ops.fastnn.cross_entropy_backward(one, *bad[:2], None, bad[2], 1, -100, 0.0, [True, False])
    with pytest.raises(RuntimeError):
        torch.ops.fastnn.softmax_backward(torch.randn(2), torch.randn(300, 400), 1)
