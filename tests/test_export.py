"""torch.export, AOTInductor, TorchScript traces and ONNX, all with a dynamic batch."""

import copy
import io
import os
import subprocess
import sys
import textwrap

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import fastnn
from fastnn.train.model import MnistCnn

BATCH = torch.export.Dim("batch", min=1, max=64)


def network():
    """Every layer that inference has, twice over."""
    return fastnn.convert(nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.GELU(), nn.ReLU6(inplace=True), nn.Conv2d(8, 8, 1), nn.GELU(approximate="tanh"),
        nn.AvgPool2d(2),
        nn.SiLU(),
        nn.AdaptiveMaxPool2d(2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 6),
        nn.LeakyReLU(), nn.BatchNorm1d(6), nn.Softmax(1), nn.ReLU(), nn.LogSoftmax(1),
    ))  # fmt: skip


@pytest.fixture
def model():
    model = network()
    model(torch.randn(8, 1, 18, 18))
    return model.eval()


def images(batch):
    return torch.randn(batch, 1, 18, 18)


def assert_same(function, model):
    for batch in (1, 4, 7):
        x = images(batch)
        torch.testing.assert_close(function(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace_keeps_the_layers(model, training):
    """torch.fx records what it does of torch.nn's; batch norm's bookkeeping is done when the graph runs."""
    steps = [m.num_batches_tracked.item() for m in model.modules() if hasattr(m, "num_batches_tracked")]
    traced = torch.fx.symbolic_trace(copy.deepcopy(model.train(training)))
    plain = torch.fx.symbolic_trace(fastnn.revert(copy.deepcopy(model)))
    assert [(n.op, n.name, n.target) for n in traced.graph.nodes] == [
        (n.op, n.name, n.target) for n in plain.graph.nodes
    ]
    assert type(traced.get_submodule("0")) is fastnn.Conv2d
    x = images(4)
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(dict(traced.state_dict()), dict(model.state_dict()))
    assert [m.num_batches_tracked.item() for m in traced.modules() if hasattr(m, "num_batches_tracked")] == [
        n + training for n in steps
    ]


class IntoEverything(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return False


def test_symbolic_trace_looks_into_what_it_would_of_torchs():
    class Own(fastnn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.linear, self.relu, self.loss = (
                Own(3, 3),
                fastnn.Linear(3, 3),
                fastnn.ReLU(),
                fastnn.NLLLoss(),
            )

        def forward(self, x, target):
            return self.loss(input=self.relu(self.relu(self.linear(self.own(x)))), target=target)

    net = Net()
    kinds = [(n.op, n.name) for n in torch.fx.symbolic_trace(net).graph.nodes if n.op.startswith("call")]
    assert kinds[0] == ("call_function", "linear")  # a subclass
    assert kinds[1:] == [("call_module", name) for name in ("linear_1", "relu", "relu_1", "loss")]
    functions = [n.target for n in IntoEverything().trace(net).nodes if n.op.startswith("call")]
    assert [f.__name__ for f in functions] == ["linear", "linear", "relu", "relu", "nll_loss"]
    assert all(f.__module__.startswith("fastnn.") for f in functions)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_program_with_a_dynamic_batch(model, strict):
    program = torch.export.export(model, (images(4),), dynamic_shapes=({0: BATCH},), strict=strict)
    assert program.graph_module.code.count("torch.ops.fastnn.") == len(model) - 1  # all but Flatten
    assert_same(program.module(), model)
    torch.export.save(program, file := io.BytesIO())
    file.seek(0)
    assert_same(torch.export.load(file).module(), model)


def test_exported_training_step(model):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = model.train(), fastnn.CrossEntropyLoss()

        def forward(self, x, y):
            return self.criterion(self.model(x), y)

    step, x, y = Step(), images(4), torch.tensor([0, 5, 2, 2])
    program = torch.export.export(step, (x, y), dynamic_shapes=({0: BATCH}, {0: BATCH}))
    statistics = model[1].running_mean.clone()
    exported = program.module()
    loss = exported(x, y)
    loss.backward()
    mean = dict(exported.named_buffers())["model.1.running_mean"]
    assert not torch.equal(mean, statistics), "the exported step must update the statistics"
    torch.testing.assert_close(loss, step(x, y))
    step(x, y).backward()
    theirs = dict(exported.named_parameters())
    for name, p in step.named_parameters():
        torch.testing.assert_close(theirs[name].grad, p.grad, msg=name)


FORWARD_OPS = (
    "linear mm bmm matmul addmm conv2d relu relu_ relu6 relu6_ leaky_relu leaky_relu_ sigmoid tanh gelu gelu_tanh silu "
    "silu_ avg_pool2d max_pool2d "
    "adaptive_avg_pool2d adaptive_max_pool2d softmax log_softmax batch_norm_eval batch_norm_train cross_entropy "
    "nll_loss"
)


def test_decomposed_into_torchs_operators(model):
    table = fastnn.decompositions()
    assert {op.name() for op in table} == {f"fastnn::{name}" for name in FORWARD_OPS.split()}
    program = torch.export.export(model, (images(4),), dynamic_shapes=({0: BATCH},)).run_decompositions(table)
    assert "fastnn" not in program.graph_module.code
    assert_same(program.module(), model)


def test_reverted_copy_holds_torchs_operators_alone(model):
    plain = fastnn.revert(copy.deepcopy(model))
    assert "fastnn" not in str(torch.jit.trace(plain, images(2)).inlined_graph)
    assert "fastnn" not in torch.export.export(plain, (images(2),)).graph_module.code
    assert_same(plain, model)


def test_trace_saved_and_frozen(model):
    trace = torch.jit.trace(model, images(4))
    torch.jit.save(trace, file := io.BytesIO())
    file.seek(0)
    assert_same(torch.jit.load(file), model)
    assert_same(torch.jit.freeze(trace), model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [lambda m: m, lambda m: nn.Sequential(m), fastnn.fuse, lambda m: fastnn.fuse(m.train())],
    ids=["converted", "inside", "frozen", "fused"],
)
def test_script_is_refused_with_advice(model, change):
    model = change(model)
    types = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile fastnn's \w+: use torch\.jit\.trace"):
        torch.jit.script(model)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.filterwarnings("ignore")
def test_scripted_after_revert(model):
    assert_same(torch.jit.script(fastnn.revert(copy.deepcopy(model))), model)


def test_aot_inductor_package(tmp_path):
    model = fastnn.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 256, 3))).eval()
    program = torch.export.export(model, (images(4),), dynamic_shapes=({0: BATCH},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_same(torch._inductor.aoti_load_package(package), model)


def test_inductor_keeps_the_ops_under_ci():
    """With CI in its environment inductor refuses to call an op for which torch's table has a decomposition."""
    code = """
        import torch, fastnn
        from torch._inductor.utils import run_and_get_code

        layer = fastnn.Conv2d(1, 4, 3)
        x = torch.randn(2, 1, 8, 8)

        def step(x):
            loss = torch.compile(layer, fullgraph=True)(x).square().sum()
            loss.backward()
            return loss

        loss, code = run_and_get_code(step, x)
        assert "fastnn.conv2d.default" in code[0] and "fastnn.conv2d_backward.default" in code[1], code
        torch.testing.assert_close(loss, layer(x).square().sum())
        program = torch.export.export(layer.eval(), (x,))
        package = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
        torch.testing.assert_close(package(x), layer(x))
    """
    environment = {**os.environ, "CI": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True, timeout=300)


# ---- ONNX ----------------------------------------------------------------------------------------------------------


def run_onnx(program):
    """A function that computes an ONNX model in numpy."""
    evaluator, name = ReferenceEvaluator(program), program.graph.input[0].name
    return lambda x: torch.from_numpy(evaluator.run(None, {name: x.numpy()})[0])


def assert_torchs(program):
    """All operators are of ONNX's own set."""
    assert {o.domain for o in program.opset_import} == {""} and not program.functions


def without_adaptive_max(model):
    """ONNX has no such operator, for torch's layer neither."""
    return nn.Sequential(*(m for m in model if not isinstance(m, nn.AdaptiveMaxPool2d))).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True], ids=["converted", "fused"])
def test_onnx_computes_the_same(model, fused):
    model = without_adaptive_max(model)
    model = fastnn.fuse(model) if fused else model
    shapes = ({0: BATCH},)
    program = torch.onnx.export(model, (images(4),), dynamo=True, dynamic_shapes=shapes, verbose=False).model_proto
    assert_torchs(program)
    assert_same(run_onnx(program), model)


@pytest.mark.filterwarnings("ignore")
def test_onnx_by_torchscript_computes_the_same(model):
    model = without_adaptive_max(model)
    axes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (images(4),), file := io.BytesIO(), dynamo=False, **axes)
    program = onnx.load_from_string(file.getvalue())
    assert_torchs(program)
    assert_same(run_onnx(program), model)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_the_mnist_network():
    model = MnistCnn(fastnn).eval()
    x = torch.randn(3, 1, 28, 28)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
    assert_torchs(program)
    torch.testing.assert_close(run_onnx(program)(x), model(x))


class Products(nn.Module):
    """Every matrix product, and the losses."""

    def forward(self, a):
        f = fastnn.functional
        b = f.addmm(f.mm(a, a), a, a, beta=2, alpha=0.5) + f.bmm(a[None], a[None])[0] + f.matmul(a, a)
        target = torch.zeros(len(a), dtype=torch.int64)
        return f.cross_entropy(b, target) + f.nll_loss(f.log_softmax(b, 1), target)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_functions():
    a = torch.randn(4, 4)
    program = torch.onnx.export(Products(), (a,), dynamo=True, verbose=False).model_proto
    assert_torchs(program)
    torch.testing.assert_close(run_onnx(program)(a), Products()(a))


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_left_of_an_onnx_export(model):
    torch.onnx.export(without_adaptive_max(model), (images(4),), dynamo=True, verbose=False)
    fastnn.fallbacks(clear=True)
    model(images(2))
    assert not fastnn.fallbacks()
    program = torch.export.export(model, (images(4),))
    assert program.graph_module.code.count("torch.ops.fastnn.") == len(model) - 1
