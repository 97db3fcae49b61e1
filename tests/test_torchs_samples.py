"""The inputs torch tests its own operators, modules and optimizers with: ours answer them as torch does."""

import copy
from itertools import islice

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_optimizers import optim_db

import fastnn

OPS = [op for op in op_db if op.name.removeprefix("nn.functional.") in fastnn.functional.__all__]
MODULES = [m for m in module_db if m.module_cls.__name__ in fastnn.__all__]
OPTIMIZERS = [o for o in optim_db if o.optim_cls.__name__ in fastnn.optim.__all__]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)
TOLERANCES = {torch.float64: 1e-11, torch.complex128: 1e-11, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# max_pool2d alone has 24000 samples: some of the first thousand, evenly spread.
MOST, AMONG = 150, 1000

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _strict():
    with fastnn.set_strict_conv(True):
        yield


def fresh(value):
    """The value with every tensor that can require a gradient copied, strides kept."""
    if isinstance(value, torch.Tensor) and not value.is_leaf:
        value = value.detach().requires_grad_()
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
    return value


def attempt(call):
    """What the call returns, or its error's type and text."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def answer(function, args, kwargs, parameters=()):
    """A call's outputs, gradients and arguments afterwards, or its error's type and text."""
    args, kwargs = list(map(fresh, args)), {k: fresh(v) for k, v in kwargs.items()}
    if kwargs.get("inplace") and args[0].requires_grad:
        args[0] = args[0] * 1
    out = attempt(lambda: function(*args, **kwargs))
    if isinstance(out, tuple) and isinstance(out[0], type):
        return out
    outputs = list(out) if isinstance(out, tuple) else [out]
    tensors = [t for t in (*args, *kwargs.values(), *parameters) if isinstance(t, torch.Tensor)]
    inputs, gradients = [t for t in tensors if t.requires_grad], ()
    if inputs:
        seed = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        gradients = torch.autograd.grad(outputs[0], inputs, seed.to(outputs[0].dtype), allow_unused=True)
        # torch's relu6 passes a NaN's gradient in the rest of a vector and not in whole ones.
        gradients = [g if g is None else g.masked_fill(x.isnan(), 0) for g, x in zip(gradients, inputs, strict=True)]
    return [*outputs, *gradients, *tensors]


def assert_same(ours, theirs):
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    assert isinstance(ours, list), ours
    for mine, torchs in zip(ours, theirs, strict=True):
        if torchs is None or not torchs.is_floating_point() and not torchs.is_complex():
            torch.testing.assert_close(mine, torchs, rtol=0, atol=0)
            continue
        tolerance = TOLERANCES.get(torchs.dtype, 2e-5)
        largest = max(torchs.detach().abs().nan_to_num(posinf=0).flatten().tolist(), default=0)
        torch.testing.assert_close(mine, torchs, rtol=tolerance, atol=tolerance * max(1, largest), equal_nan=True)


def samples_of(op):
    for dtype in DTYPES:
        if dtype not in op.dtypes:
            continue
        kinds = (op.sample_inputs, op.reference_inputs) if dtype == torch.float32 else (op.sample_inputs,)
        for kind in kinds:
            samples = list(islice(kind("cpu", dtype, requires_grad=dtype.is_floating_point), AMONG))
            yield from samples[:: len(samples) // MOST + 1]
    if op.error_inputs_func is not None:
        yield from (e.sample_input for e in op.error_inputs("cpu"))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.full_name)
def test_function(op):
    name = op.name.removeprefix("nn.functional.")
    theirs = getattr(torch.nn.functional, name, None) or getattr(torch, name)
    for sample in samples_of(op):
        args = sample.input, *sample.args
        assert_same(*(answer(f, args, sample.kwargs) for f in (getattr(fastnn.functional, name), theirs)))


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
@pytest.mark.parametrize("training", [True, False])
def test_module(info, training):
    classes = getattr(fastnn, info.module_cls.__name__), info.module_cls

    def built(kind, inputs, dtype=torch.float32):
        torch.manual_seed(0)
        return kind(*inputs.args, **inputs.kwargs).to(dtype).train(training)

    for dtype in DTYPES[:4]:
        options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
        for sample in info.module_inputs_func(info, **options):
            ours, theirs = (built(kind, sample.constructor_input, dtype) for kind in classes)
            assert repr(ours) == repr(theirs)
            call = sample.forward_input
            assert_same(*(answer(m, call.args, call.kwargs, (*m.parameters(), *m.buffers())) for m in (ours, theirs)))
    if info.module_error_inputs_func is None:
        return
    options = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": training}
    for sample in (e.module_error_input for e in info.module_error_inputs_func(info, **options)):

        def run(kind, sample=sample):
            built(kind, sample.constructor_input)(*sample.forward_input.args, **sample.forward_input.kwargs)

        ours, theirs = (attempt(lambda kind=kind: run(kind)) for kind in classes)
        assert ours == theirs


@pytest.mark.parametrize("info", OPTIMIZERS, ids=lambda info: info.optim_cls.__name__)
@pytest.mark.parametrize("implementation", ["", "foreach", "fused"])
def test_optimizer(info, implementation):
    classes = getattr(fastnn.optim, info.optim_cls.__name__), info.optim_cls
    chosen = {implementation: True} if implementation in info.supported_impls else {}

    def train(kind, options):
        generator = torch.Generator().manual_seed(0)
        shapes = (3, 4), (5,), (2, 3, 4, 5), (), (0, 2)
        parameters = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
        optimizer = kind(parameters, **copy.deepcopy(options))
        for step in range(4):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            if step == 2:
                parameters[1].grad = None
            optimizer.step()
        return [*parameters, optimizer.state_dict()]

    for sample in info.optim_inputs_func("cpu"):
        options = {**sample.kwargs, **chosen}
        ours, theirs = (attempt(lambda kind=kind, options=options: train(kind, options)) for kind in classes)
        if isinstance(theirs, tuple):
            assert ours == theirs
        else:
            torch.testing.assert_close(ours, theirs)
    for dtype in (torch.float32, torch.float64):
        for error in info.optim_error_inputs_func("cpu", dtype):
            sample = error.optimizer_error_input

            def step(kind, sample=sample):
                kind(sample.params, **sample.kwargs).step()

            ours, theirs = (attempt(lambda kind=kind: step(kind)) for kind in classes)
            assert ours == theirs
