"""fuse(): the same results in both modes, the same parameters, keys and hooks, and a way back."""

import copy
import pickle
import warnings

import pytest
import torch
from fused_models import MODELS, build, close, quiet_report, resnet, step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastnn

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
@pytest.mark.parametrize("crop", [False, True])
def test_frozen_results_lie_as_the_models(crop, weights, images):
    """Feature maps: channels_last where the images or the weights are, the latter also if that is set afterwards."""
    x = torch.randn(2, 5, 14, 14).contiguous(memory_format=images)[:, :3, 1:13, 1:13]
    x = x if crop else x.contiguous(memory_format=images)
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

    class Adds(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    with pytest.raises(RuntimeError, match="no gradients"):  # in a list, too
        fastnn.fuse(Adds().eval())([x, x.detach()])
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


# ---- compile, export and transforms --------------------------------------------------------------------------------


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


class Scaled(nn.Module):
    """Two arguments, and a layer of every kind that freezing makes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(3)
        self.pool, self.linear = nn.MaxPool2d(2), nn.Linear(4, 5)

    def forward(self, image, scale):
        x = self.pool(self.conv(torch.relu(self.norm(image) * scale)))
        return self.linear(x.flatten(2).transpose(1, 2)).relu()


def test_frozen_copies_are_traced_layer_by_layer():
    model, (image, scale) = Scaled().eval(), torch.randn(2, 2, 3, 8, 8)
    frozen = fastnn.fuse(model)
    with torch.no_grad():
        expected = model(image, scale)
        assert close(frozen(scale=scale, image=image), expected, torch.float32)
        traced = torch.fx.symbolic_trace(frozen)
        assert close(traced(image, scale), expected, torch.float32)
        names = {n.target for n in traced.graph.nodes if n.op == "call_module"}
        assert names == {f"body.{name}" for name in ("norm", "conv", "pool", "linear")}
        within = torch.fx.symbolic_trace(nn.Sequential(fastnn.fuse(resnet().eval()), nn.Softmax(1)))
        assert [n.target for n in within.graph.nodes if n.op == "call_module"] == ["0", "1"]
        assert torch.equal(within(image), getattr(within, "1")(getattr(within, "0")(image)))


def test_many_models_compile_whole():
    """More than Dynamo compiles one code for."""
    torch._dynamo.reset()
    x = torch.randn(2, 3, 8, 8)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        scope = {}
        exec("class Block(Sequential):\n    def forward(self, x): return self[2](self[1](self[0](x)))", vars(nn), scope)
        model = scope["Block"](nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        for fused in (fastnn.fuse(copy.deepcopy(model).eval()), fastnn.fuse(model)):
            with torch.no_grad():
                expected = copy.deepcopy(fused)(x)
                assert close(torch.compile(fused, fullgraph=True, backend="eager")(x), expected, torch.float32)


def test_flops_are_counted_and_vmap_runs():
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
