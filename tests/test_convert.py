"""convert, revert, report and disabled on real module trees."""

import contextlib
import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastnn
from fastnn.convert import TWINS


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.LogSoftmax(dim=1),
    )


def one_step(model, x, target):
    """Loss, output and gradients of one training step."""
    out = model(x)
    loss = nn.functional.nll_loss(out, target)
    loss.backward()
    return out, [p.grad.clone() for p in model.parameters()]


def test_every_module_of_the_package_has_a_twin():
    for name in ("Linear", "Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU", "CrossEntropyLoss"):
        assert TWINS[getattr(nn, name)] is getattr(fastnn, name)


def test_convert_keeps_objects_and_results():
    model = small_net()
    reference = copy.deepcopy(model)
    parameters, keys, calls = list(model.parameters()), list(model.state_dict()), []
    model[0].register_forward_hook(lambda *a: calls.append(1))
    assert fastnn.convert(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert type(model[0]) is fastnn.Conv2d and type(model[6]) is nn.Flatten
    x, target = torch.randn(3, 1, 12, 12), torch.tensor([0, 4, 2])
    for a, b in zip(one_step(model, x, target)[1], one_step(reference, x, target)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert calls == [1]


def test_convert_then_revert_restores_every_bit():
    model = small_net()
    hook = model[4].register_forward_hook(lambda *a: None)
    before = copy.deepcopy(model)
    types = [type(m) for m in model.modules()]
    fastnn.revert(fastnn.convert(model))
    assert [type(m) for m in model.modules()] == types
    assert hook.id in model[4]._forward_hooks
    x, target = torch.randn(3, 1, 12, 12), torch.tensor([0, 4, 2])
    (out_a, grads_a), (out_b, grads_b) = one_step(model, x, target), one_step(before, x, target)
    assert torch.equal(out_a, out_b) and all(map(torch.equal, grads_a, grads_b))
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_convert_a_copy():
    model = small_net()
    other = fastnn.convert(model, inplace=False)
    assert type(model[0]) is nn.Conv2d and type(other[0]) is fastnn.Conv2d


@pytest.mark.parametrize(
    ("options", "converted"),
    [
        ({"include": nn.Linear}, {7}),
        ({"include": "[04]"}, {0, 4}),
        ({"include": lambda name, m: name == "3"}, {3}),
        ({"include": [nn.Linear, "0"]}, {0, 7}),
        ({"include": [nn.Conv2d, nn.Linear], "exclude": "4"}, {0, 7}),
        ({"include": []}, set()),
    ],
)
def test_include_and_exclude(options, converted):
    model = fastnn.convert(small_net(), **options)
    assert {i for i, m in enumerate(model) if type(m).__module__.startswith("fastnn")} == converted


@pytest.mark.parametrize(("options", "converted"), [({"include": "head.*"}, True), ({"exclude": "head.*"}, False)])
def test_a_layer_with_two_names_is_matched_by_either(options, converted):
    act = nn.ReLU()
    model = nn.ModuleDict({"body": nn.Sequential(act), "head": nn.Sequential(nn.Linear(2, 2), act)})
    fastnn.convert(model, **options)
    assert (type(act) is fastnn.ReLU) == converted


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_revert_reaches_layers_parametrized_since():
    model = fastnn.convert(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(1, 2, 1)))
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[1])
    other, x = copy.deepcopy(model).eval(), torch.randn(2, 1, 3, 3)
    expected = model.eval()[1](x)
    fastnn.revert(model)
    assert [type(m).__base__ for m in model] == [nn.Linear, nn.Conv2d]
    assert [type(m).__base__ for m in other] == [fastnn.Linear, fastnn.Conv2d]
    torch.testing.assert_close(model[1](x), expected)
    assert fastnn.report(other, console=Console(file=io.StringIO()))[0].native
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear and not fastnn.fallbacks()


def test_report_tells_whose_forward_runs():
    class Plain(fastnn.Linear):
        pass

    class Own(fastnn.Linear):
        def forward(self, x):
            return x

    replaced = fastnn.ReLU()
    replaced.forward = lambda x: x
    rows = fastnn.report(nn.Sequential(Plain(2, 2), Own(2, 2), replaced), console=Console(file=io.StringIO()))
    assert [r.native for r in rows] == [True, False, False]
    assert "subclass" in rows[1].reason and "replaced" in rows[2].reason


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_what_is_left_alone_and_why():
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "subclass": OwnConv(1, 1, 1),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "normed": nn.utils.weight_norm(nn.Linear(2, 2)),
            "replaced": replaced,
            "flatten": nn.Flatten(),
            "linear": nn.Linear(2, 2),
        }
    )
    types = {name: type(m) for name, m in model.items()}
    fastnn.convert(model)
    assert {n for n, m in model.items() if type(m) is not types[n]} == {"linear"}
    text = io.StringIO()
    rows = {r.name: r for r in fastnn.report(model, console=Console(file=text, width=120))}
    assert rows["linear"].native and not rows["flatten"].native
    assert "subclass" in rows["subclass"].reason and "WeightNorm" in rows["normed"].reason
    assert "replaced" in rows["replaced"].reason and "no fastnn twin" in rows["flatten"].reason
    assert "layers run on fastnn" in text.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_stay_and_compute_the_same():
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 5)).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {"3"}, dtype=torch.qint8)
    model[4].qconfig = torch.ao.quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
    model[4] = torch.ao.nn.qat.Linear.from_float(model[4].train()).eval()
    x, types = torch.randn(2, 1, 8, 8), [type(m) for m in model]
    expected = model(x)
    fastnn.convert(model)
    assert [type(m) for m in model] == [fastnn.Conv2d, fastnn.ReLU, *types[2:]]
    torch.testing.assert_close(model(x), expected)
    fastnn.revert(model)
    assert [type(m) for m in model] == types and torch.equal(model(x), expected)


def test_an_optimizer_of_before_goes_on_after():
    models = small_net(), small_net()
    models[1].load_state_dict(models[0].state_dict())
    x, target = torch.randn(3, 1, 12, 12), torch.tensor([0, 4, 2])
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for change in (lambda m: m, fastnn.convert, fastnn.revert):
            if model is models[1]:
                change(model)
            for _ in range(2):
                optimizer.zero_grad()
                nn.functional.nll_loss(model(x), target).backward()
                optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_torch_itself_is_not_touched():
    """The classes and functions that others hold are the ones that torch defined."""
    names = [name for name in dir(nn) + dir(nn.functional) if not name.startswith("_")]
    before = [getattr(nn, name, None) or getattr(nn.functional, name) for name in names]
    forwards = [original.forward for original in TWINS]
    model = fastnn.fuse(fastnn.convert(small_net()))
    model(torch.randn(3, 1, 12, 12)).sum().backward()
    fastnn.revert(model)
    assert all(a is (getattr(nn, n, None) or getattr(nn.functional, n)) for n, a in zip(names, before, strict=True))
    assert all(original.forward is f for original, f in zip(TWINS, forwards, strict=True))
    assert not any("fastnn" in f.__module__ for f in forwards)


def test_disabled_runs_torch_kernels_bit_for_bit():
    model, x, target = small_net(), torch.randn(3, 1, 12, 12), torch.tensor([0, 4, 2])
    converted = fastnn.convert(model, inplace=False)
    with fastnn.disabled():
        ours = one_step(converted, x, target)
    torchs = one_step(model, x, target)
    assert torch.equal(ours[0], torchs[0]) and all(map(torch.equal, ours[1], torchs[1]))
    assert not fastnn.fallbacks()


@pytest.mark.parametrize("second", [False, True])
def test_backward_of_what_was_recorded_outside_of_disabled(second):
    x, target = torch.randn(3, 1, 12, 12), torch.tensor([0, 4, 2])
    layers = [
        fastnn.Conv2d(1, 4, 3), fastnn.BatchNorm2d(4), fastnn.ReLU6(), fastnn.MaxPool2d(2), fastnn.AvgPool2d(2, 1),
        fastnn.AdaptiveAvgPool2d(3), fastnn.AdaptiveMaxPool2d(2), nn.Flatten(), fastnn.Linear(16, 5),
        fastnn.LogSoftmax(1),
    ]  # fmt: skip
    model, results = nn.Sequential(*layers).double(), []
    for inside in (False, True):
        image = x.double().requires_grad_()
        y = model(image)
        loss = fastnn.functional.nll_loss(y, target) + fastnn.functional.cross_entropy(2 * y, target)
        with fastnn.disabled() if inside else contextlib.nullcontext():
            (g,) = torch.autograd.grad(loss, image, create_graph=second)
            results.append(torch.autograd.grad(g.square().sum(), model[0].weight)[0] if second else g)
    torch.testing.assert_close(*results)


def test_convert_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="torch.nn.Module"):
        fastnn.convert([nn.Linear(1, 1)])
