"""torch.export, AOTInductor, TorchScript traces and what ONNX needs, all with a dynamic batch."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._decomp import get_decompositions

import fastnn

BATCH = torch.export.Dim("batch", min=1, max=64)


def network():
    """Every layer that inference has, twice over."""
    return fastnn.convert(nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 1), nn.GELU(approximate="tanh"), nn.AvgPool2d(2), nn.SiLU(),
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
    "linear mm bmm matmul addmm conv2d relu relu_ leaky_relu sigmoid tanh gelu gelu_tanh silu avg_pool2d max_pool2d "
    "adaptive_avg_pool2d adaptive_max_pool2d softmax log_softmax batch_norm_eval batch_norm_train cross_entropy "
    "nll_loss"
)


def test_decomposed_into_torchs_operators(model):
    """What torch.onnx.export(dynamo=True) does: it takes the decompositions registered with torch."""
    table = get_decompositions([getattr(torch.ops.fastnn, name).default for name in FORWARD_OPS.split()])
    assert len(table) == len(FORWARD_OPS.split())
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


def test_aot_inductor_package(tmp_path):
    model = fastnn.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 256, 3))).eval()
    program = torch.export.export(model, (images(4),), dynamic_shapes=({0: BATCH},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_same(torch._inductor.aoti_load_package(package), model)
