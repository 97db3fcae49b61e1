"""fuse(): the same results in both modes, the same parameters, keys and hooks, and a way back."""

import copy
import io
import math
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as TF
from rich.console import Console
from torch import nn

import fastnn


class Block(nn.Module):
    """A residual block with one ReLU module for both places, as torchvision writes it."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Block(16, 16, 1), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class PreActivation(nn.Module):
    """Norms before convolutions, functional ReLUs, and concatenations, called with a list."""

    def __init__(self, channels, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = torch.cat(features, 1)
        x = self.conv1(TF.relu(self.norm1(x)))
        return self.conv2(TF.relu(self.norm2(x), inplace=True))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(PreActivation(8 + 4 * i, 4) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = torch.relu_(self.norm(torch.cat(features, 1)))
        return self.head(TF.adaptive_avg_pool2d(x, 1).view(x.size(0), 20))


class Inverted(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        wide = 4 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.Dropout(0.0),
        )  # fmt: skip
        self.adds = stride == 1

    def forward(self, x):
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(), Inverted(12, 1), Inverted(12, 2),
        nn.Flatten(), nn.Linear(12 * 64, 6),
    )  # fmt: skip


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.0), nn.Linear(40, 30),
        nn.ReLU6(), nn.Linear(30, 7),
    )  # fmt: skip


class Odd(nn.Module):
    """Values used twice, a shared convolution, circular padding, groups, a broadcast addition, in-place surprises."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.shared = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("shift", torch.randn(1, 8, 1, 1))

    def forward(self, x):
        a = self.conv(x)
        b = self.bn1(a)
        c = TF.relu(b) + b  # b has two users
        d = self.bn2(self.shared(c)) + self.shift  # broadcast
        e = TF.relu(self.bn3(self.shared(TF.relu(d))))
        f = self.bn1(e)
        if torch.is_grad_enabled():
            e = 2 * e
        else:
            e.mul_(2)  # after bn1 read it, before the addition
        g = torch.relu(f + c)
        return (g * self.scale + e).mean((2, 3))


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as a library's own subclass writes it."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = act

    def forward(self, x):
        torch._assert(x.ndim == 4, "images wanted")
        x = TF.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(x)


def norm_act():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), NormAct(8, nn.SiLU(inplace=True)),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), NormAct(8, nn.Hardswish()),
        nn.Conv2d(8, 4, 1), NormAct(4, nn.Identity()),
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 5), nn.SiLU(),
    )  # fmt: skip


MODELS = {"norm_act": norm_act, "resnet": resnet, "dense": Dense, "mobilenet": mobilenet, "mlp": mlp, "odd": Odd}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[name]()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -0.5, 0.5)
    return model.to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)


def quiet_report(model):
    return fastnn.report(model, console=Console(file=io.StringIO()))


def close(a, b, dtype):
    bound = 1e-4 if dtype == torch.float32 else 1e-10
    return (a - b).abs().max() <= bound * b.abs().max().clamp_min(1e-3)


def step(model, x):
    """Output, gradient of the input and of every parameter, and every buffer afterwards."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.double() for b in model.buffers())]


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_a_norm_over_positions_is_not_over_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()).double()
    model(torch.randn(5, 6).double())
    fused = fastnn.fuse(model.eval())
    for x in (torch.randn(5, 6).double(), torch.randn(3, 8, 6).double()):
        assert close(fused(x), model(x).detach(), torch.float64)
    assert quiet_report(fused)[0].reason == "fused: Linear + BatchNorm1d + ReLU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_frozen_copy_equals_the_model(name, convert, dtype):
    model, x = build(name, dtype)
    model.eval()
    if convert:
        fastnn.convert(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
    fused = fastnn.fuse(model)
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=torch.channels_last), x[:1], x[:0], x):
            wanted = expected[: len(given)]
            result = fused(given.clone())
            assert result.shape == wanted.shape and result.dtype == dtype
            assert len(given) == 0 or close(result, wanted, dtype)
        for p in model.parameters():
            p.zero_()
        assert close(fused(x), expected, dtype)  # a copy
    fastnn.revert(model)
    assert list(before) == list(model.state_dict())


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [torch.contiguous_format, torch.channels_last])
def test_frozen_results_lie_as_the_models(weights, images):
    """Feature maps: channels_last where the images or the weights are, the latter also if that is set afterwards."""
    x = torch.randn(2, 3, 12, 12).contiguous(memory_format=images)
    for layers in ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()], [nn.MaxPool2d(2), nn.Conv2d(3, 8, 1)]):
        torch._dynamo.reset()  # it compiles one forward for eight models at most
        model = nn.Sequential(*layers).eval()
        late = fastnn.fuse(model).to(memory_format=weights)
        model.to(memory_format=weights)
        with torch.no_grad():
            strides = model(x).stride()
            for fused in (fastnn.fuse(model), late, torch.compile(fastnn.fuse(model), fullgraph=True, backend="eager")):
                assert fused(x).stride() == strides


def test_frozen_layers_are_joined():
    model, _ = build("resnet")
    joined = {row.name: row.reason for row in quiet_report(fastnn.fuse(model.eval()))}
    assert joined["body.0"] == "fused: Conv2d + BatchNorm2d + ReLU"
    assert joined["body.4.conv2"] == "fused: Conv2d + BatchNorm2d + add + ReLU"
    assert joined["body.5.conv2"] == "fused: Conv2d + BatchNorm2d"
    assert joined["body.5.downsample.0"] == "fused: Conv2d + BatchNorm2d + add + ReLU"  # the later of the two
    assert not any("bn" in name for name in joined)
    model, _ = build("mobilenet")
    joined = {row.name: row.reason for row in quiet_report(fastnn.fuse(model.eval()))}
    assert joined["body.3.body.3"] == "fused: Conv2d + BatchNorm2d + ReLU6"
    assert joined["body.3.body.6"] == "fused: Conv2d + BatchNorm2d + add"
    model, _ = build("norm_act")
    joined = {row.name: row.reason for row in quiet_report(fastnn.fuse(model.eval()))}
    assert joined["body.0"] == "fused: Conv2d + batch_norm + SiLU"
    assert joined["body.2"] == "fused: Conv2d + batch_norm + Hardswish"
    assert joined["body.4"] == "fused: Conv2d + batch_norm"
    model, _ = build("dense")
    joined = {row.name: row.reason for row in quiet_report(fastnn.fuse(model.eval()))}
    assert joined["body.layers.2.conv1"] == "fused: BatchNorm2d + ReLU + Conv2d + BatchNorm2d + ReLU"
    assert joined["body.norm"] == "fused: BatchNorm2d + ReLU"
    assert not any("norm1" in name or "norm2" in name for name in joined)


def test_frozen_model_is_for_inference():
    model, x = build("resnet")
    fused = fastnn.fuse(model.eval())
    with pytest.raises(RuntimeError, match="no gradients"):
        fused(x.requires_grad_())
    with pytest.raises(RuntimeError, match="frozen"):
        fused.train()
    assert fused.eval() is fused and fastnn.fuse(fused) is fused
    assert not list(fused.parameters())
    with pytest.raises(TypeError, match="fuse"):
        fastnn.fuse(torch.relu)


@pytest.mark.parametrize("name", MODELS)
def test_frozen_model_copies_and_pickles(name):
    model, x = build(name)
    fused = fastnn.fuse(model.eval())
    expected = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
    assert close(fused.double()(x.double()), expected.double(), torch.float32)


def test_frozen_16_bit():
    model, x = build("resnet")
    model.eval()
    with torch.no_grad():
        expected = model(x)
        half = fastnn.fuse(model.bfloat16())(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() <= 0.05 * expected.abs().max()


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_the_model(name, convert):
    model, x = build(name, torch.float64)
    twin = copy.deepcopy(model)
    if convert:
        fastnn.convert(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert fastnn.fuse(model) is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for _ in range(2):
        for a, b in zip(step(model, x), step(twin, x), strict=True):
            assert close(a, b, torch.float64)
    model.eval(), twin.eval()
    for a, b in zip(step(model, x), step(twin, x), strict=True):
        assert close(a, b, torch.float64)


def test_training_joins_blocks():
    model, _ = build("resnet")
    rows = {row.name: row for row in quiet_report(fastnn.fuse(model))}
    assert rows["4.bn1"].reason == "fused: bn1 + relu"
    assert rows["4.bn2"].reason == "fused: bn2 + add + relu"
    assert rows["1"].reason == "fused: 1 + 2" and rows["1"].native
    model, _ = build("dense")
    with torch.profiler.profile() as profile:
        fastnn.fuse(model)(torch.randn(2, 3, 32, 32))
    names = [event.key for event in profile.key_averages()]
    assert "fastnn::batch_norm_train" in names and "aten::relu" not in names  # called with lists


@pytest.mark.parametrize("name", MODELS)
def test_revert_is_exact(name):
    model, x = build(name)
    twin, types = copy.deepcopy(model), [type(m) for m in model.modules()]
    fastnn.revert(fastnn.fuse(fastnn.convert(model)))
    assert [type(m) for m in model.modules()] == types
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(m.__dict__) for m in twin.modules()]
    assert repr(model) == repr(twin)
    for a, b in zip(step(model, x), step(twin, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_fused_training_model_copies_and_pickles(name):
    model, x = build(name)
    fastnn.fuse(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = step(model, x)
    for other in copies:
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert all(torch.equal(a, b) for a, b in zip(step(other, x), expected, strict=True))
    assert repr(copies[0]) == repr(model)


def test_fused_twice_and_frozen_afterwards():
    model, x = build("resnet")
    fastnn.fuse(fastnn.fuse(model))
    model(x)
    model.eval()
    with torch.no_grad():
        assert close(fastnn.fuse(model)(x), fastnn.revert(model)(x), torch.float32)


# ---- hooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_saw(when):
    def watch(model, seen):
        for name, m in model.named_modules():
            if name in ("4", "4.bn1", "5.relu", "5.downsample", "5.conv2"):
                m.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out.detach().clone())))

    model, x = build("resnet", torch.float64)
    twin, seen, wanted = copy.deepcopy(model), [], []
    watch(twin, wanted)
    if when == "before":
        watch(model, seen)
    fastnn.fuse(model)
    if when == "after":
        watch(model, seen)
    model(x), twin(x)
    assert [name for name, _ in seen] == [name for name, _ in wanted]
    assert all(close(a, b, torch.float64) for (_, a), (_, b) in zip(seen, wanted, strict=True))


def test_hooks_fire_in_the_frozen_copy():
    model, x = build("resnet", torch.float64)
    model.eval()
    wanted = []
    for name in ("0", "4", "4.bn1", "5.relu", "5.downsample"):
        model.get_submodule(name).register_forward_hook(lambda m, args, out: wanted.append(out.detach().clone()))
    model(x)
    expected, wanted[:] = list(wanted), []
    fastnn.fuse(model)(x)  # the copy's hooks are copies of the closures: the same list
    assert len(wanted) == len(expected) == 6
    assert all(close(a, b, torch.float64) for a, b in zip(wanted, expected, strict=True))


# ---- what fx cannot trace ------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.body(x)
        return torch.relu(self.norm(self.conv(x))) if x.mean() > 0 else x


class Counts(Branches):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.norm(self.conv(self.body(x)))


class Draws(Branches):
    def forward(self, x):
        x = self.body(x)
        return torch.relu(self.norm(self.conv(x))) if random.random() < 0.5 else self.conv(x)


class Makes(Branches):
    def forward(self, x):
        return torch.relu(self.norm(self.conv(self.body(x)))) + torch.ones(1)


class Keeps(Branches):
    def __init__(self):
        super().__init__()
        self.outputs = []

    def forward(self, x):
        self.outputs.append(self.body(x))
        return torch.relu(self.norm(self.conv(self.outputs.pop() + 0 * len(self.outputs))))


class Remembers(Keeps):
    def forward(self, x):
        self.outputs.append(self.body(x))
        return torch.relu(self.norm(self.conv(self.outputs[-1])))


class FrozenStem(Branches):
    def forward(self, x):
        with torch.no_grad():
            x = self.body(x)
        return torch.relu(self.norm(self.conv(x)))


class Checkpoints(Branches):
    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
        return torch.relu(self.norm(self.conv(x)))


def test_a_list_that_ends_as_it_was_is_no_obstacle():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fastnn.fuse(Keeps())
    assert {row.name: row.reason for row in quiet_report(model)}["norm"].startswith("fused")


@pytest.mark.parametrize("kind", [Branches, Counts, Draws, Makes, Remembers, FrozenStem, Checkpoints])
def test_untraceable_blocks_stay_and_are_named(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Flatten(), nn.Linear(8 * 28 * 28, 3)).double()
    x = torch.randn(2, 3, 32, 32).double()
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"(?s)cannot trace.*\n  0: "):
        fastnn.fuse(model)
    assert not hasattr(model[0], "calls") and not getattr(model[0], "outputs", None)
    rows = {row.name: row.reason for row in quiet_report(model)}
    assert rows["0.body.1"] == "fused: 1 + 2" and rows["0.norm"] != "fused: norm + relu"
    for _ in range(3):
        random.seed(1)
        a = step(model, x)
        random.seed(1)
        b = step(twin, x)
        assert all((p is None and q is None) or close(p, q, torch.float64) for p, q in zip(a, b, strict=True))
    assert getattr(model[0], "calls", None) == getattr(twin[0], "calls", None)


@pytest.mark.parametrize("kind", [Branches, Counts, Draws])
def test_untraceable_blocks_in_a_frozen_copy(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Flatten(), nn.Linear(8 * 28 * 28, 3)).double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    with pytest.warns(UserWarning, match=r"(?s)cannot trace.*\n  0: "):
        fused = fastnn.fuse(model)
    reasons = [row.reason for row in quiet_report(fused)]
    assert "fused: Conv2d + BatchNorm2d + ReLU" in reasons
    with torch.no_grad():
        for _ in range(3):
            random.seed(2)
            a = fused(x)
            random.seed(2)
            assert close(a, model(x), torch.float64)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3)])

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("edit", ["append", "insert", "delete", "put_in_the_list"])
def test_blocks_edited_afterwards_run_as_edited(edit):
    """A layer more or less is seen at the next call; torch.fx recorded the ones there were."""
    torch.manual_seed(0)
    model = nn.Sequential(Listed(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    model, x = model.double().train(), torch.randn(2, 3, 9, 9).double()
    twin = copy.deepcopy(model)
    fused = fastnn.fuse(fastnn.convert(model))
    step(fused, x)
    step(twin, x)
    for m in (fused, twin):
        torch.manual_seed(1)
        if edit == "append":
            m.append(nn.Sigmoid())
        elif edit == "insert":
            m.insert(2, nn.Conv2d(4, 4, 3).double())
        elif edit == "delete":
            del m[4]
        else:
            m[0].layers.insert(1, nn.Conv2d(8, 8, 3, 2).double())
    for mode in (True, False):
        for a, b in zip(step(fused.train(mode), x), step(twin.train(mode), x), strict=True):
            assert close(a, b, torch.float64)
    reasons = {row.name: row.reason for row in quiet_report(fused)}
    assert reasons["3"] == ("fused: 3 + 4" if edit == "insert" else "fused: 2 + 3")


def test_other_arguments_run_as_written():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, scale=None):
            y = torch.relu(self.norm(self.conv(x)))
            return y if scale is None else y * scale

    torch.manual_seed(0)
    model, x = Two(), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    fastnn.fuse(model)
    for arguments, keywords in ((x,), {}), ((x, 2.0), {}), ((x,), {"scale": torch.ones(1)}):
        assert close(model(*arguments, **keywords), twin(*arguments, **keywords), torch.float32)


def test_flops_are_counted_and_vmap_runs():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = build("resnet")
    frozen = fastnn.fuse(model.eval())
    counts = []
    for one in (model, frozen):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with torch.no_grad():
        assert close(torch.vmap(frozen)(x.unsqueeze(1)).squeeze(1), frozen(x), torch.float32)


# ---- compile and export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_compile_and_export(name):
    torch._dynamo.reset()  # see above
    model, x = build(name)
    twin = copy.deepcopy(model)
    fastnn.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(compiled, x)[:2], step(twin, x)[:2], strict=True):
        assert close(a, b, torch.float32)
    model, _ = build(name)
    frozen = fastnn.fuse(model.eval())
    expected = frozen(x)
    with torch.no_grad():
        assert close(torch.compile(frozen, fullgraph=True, backend="aot_eager")(x), expected, torch.float32)
        assert close(torch.export.export(frozen, (x,)).module()(x), expected, torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert close(torch.jit.trace(frozen, x)(x), expected, torch.float32)


class Positions(nn.Module):
    """Takes a shape, not a tensor, as some position encodings do."""

    def forward(self, shape):
        return torch.zeros(shape)


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.positions = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Positions()

    def forward(self, x):
        y = TF.relu(self.norm(self.conv(x)))
        return y + self.positions((y.shape[2], y.shape[3])) + math.ceil(y.shape[2] / 4)


@pytest.mark.filterwarnings("ignore:fastnn.fuse")
@pytest.mark.parametrize("training", [True, False])
def test_sizes_are_not_taken_for_tensors(training):
    model, x = Positioned().train(training), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(fastnn.fuse(model)(x), expected)
