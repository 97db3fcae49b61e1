"""Tracing a module's forward() with torch.fx, and refusing traces that would not mean the same as the code."""

import copy
import dataclasses
import inspect
import linecache
import operator
import random
import sys
from collections import OrderedDict

import torch
from torch import fx

from fastnn import modules
from fastnn._fuse.layers import Frozen, with_fields

LIBRARY = ("torch.nn", "fastnn.modules", "fastnn._fuse")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CannotTrace(Exception):
    """Why a forward() is left as it is."""

    where = ""


def fields_of(value, f):
    """f of a dataclass's fields, by name: of those that its __init__() takes, and of the others."""
    fields = [field for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return tuple({d.name: f(getattr(value, d.name)) for d in fields if d.init == taken} for taken in (True, False))


class _TensorProxy(fx.Proxy):
    """A proxy that isinstance() takes for a tensor: code that asks then goes the way that tensors go.

    Only a line of Python that says isinstance gets that answer. torch's own C++ code asks too, and would read the
    proxy's memory as a tensor's (torch.zeros(proxy) does).
    """

    _is_param = False

    @property
    def __class__(self):
        asks = sys._getframe(1)
        line = linecache.getline(asks.f_code.co_filename, asks.f_lineno)
        return torch.Tensor if "isinstance" in line else _TensorProxy


def _in_place(function):
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    # fx records `y += x` as y = y + x, which hides that the old y changes too.
    setattr(_TensorProxy, f"__{_name}__", _in_place(getattr(operator, _name)))


_SIZES = ("size", "dim", "numel", "shape", "ndim", "ndimension", "stride")


def _is_size(node):
    """Whether the node's value is a size, or a number made of sizes, so that no code may take it for a tensor."""
    if node.op == "call_method":
        return node.target in _SIZES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZES
    inputs = node.all_input_nodes
    module = getattr(node.target, "__module__", None)
    return module in ("_operator", "builtins") and bool(inputs) and all(map(_is_size, inputs))


class Tracer(fx.Tracer):
    """Records calls of leaf modules and functions; `leaves(module, name)` decides what a leaf is."""

    proxy_buffer_attributes = True

    def __init__(self, leaves=lambda module, name: True, modes=None):
        super().__init__()
        self.leaves = leaves
        self.modes = modes  # () -> the modes torch is in, which a graph cannot change
        self.start = modes() if modes else None
        self.calling = []  # names of the modules being traced into, innermost last

    def create_node(self, *args, **kwargs):
        if self.modes and self.modes() != self.start:
            raise CannotTrace("its forward() changes torch's modes (no_grad, autocast, checkpoint)")
        return super().create_node(*args, **kwargs)

    def proxy(self, node):
        return fx.Proxy(node, self) if _is_size(node) else _TensorProxy(node, self)

    def create_arg(self, a):
        if type(a) is _TensorProxy:
            return a.node
        if isinstance(a, dict) and type(a) is not dict:  # fx would make a plain one
            return self._made(type(a), *self._made_of(a))
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            return self._made(type(a), (), *fields_of(a, self.create_arg))
        return super().create_arg(a)

    def _made_of(self, a):
        """The arguments that make such a dict again: a dataclass (transformers' ModelOutput) takes its fields."""
        if dataclasses.is_dataclass(a):
            return (), *fields_of(a, self.create_arg)
        if type(a) is not OrderedDict:
            raise CannotTrace(f"it makes a {type(a).__name__}")
        return ([(self.create_arg(key), self.create_arg(value)) for key, value in a.items()],), {}, {}

    def _made(self, kind, args, kwargs, rest):
        made = self.create_node("call_function", kind, args, kwargs)
        return self.create_node("call_function", with_fields, (made, rest), {}) if rest else made

    def is_leaf_module(self, m, module_qualified_name):
        return self.leaves(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        self.calling.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.calling.pop()  # not reached when tracing fails: then the last entry tells where
        return result


def has_hooks(module):
    """Whether something looks at the module's calls, so that they have to happen as written."""
    return any(getattr(module, name, None) for name in _HOOKS)


def is_plain(module, kinds):
    """Whether the module is exactly of one of these types, without hooks and without a forward() of its own."""
    return type(module) in kinds and "forward" not in module.__dict__ and not has_hooks(module)


def is_library(module):
    """A layer of torch.nn or fastnn that computes by itself (a Sequential is a container)."""
    return type(module).__module__.startswith(LIBRARY) and not isinstance(module, torch.nn.Sequential)


def required_arguments(module):
    """Names of forward()'s arguments without a default. Raises CannotTrace when it takes any number of them."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise CannotTrace("its forward() takes any arguments")
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise CannotTrace("its forward() takes keywords")
    return [p.name for p in parameters if p.default is p.empty]


def _inference_modes():
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _training_modes():
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return *_inference_modes(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks


def _random_state():
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()) if numpy else None


def _content(value):
    """What can change inside an attribute's value without another value taking its place."""
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else value._version
    return copy.copy(value) if type(value) in (list, dict, set) else None


def _attributes(module):
    return {
        (name, key): (value, _content(value))
        for name, m in module.named_modules()
        for place in (m.__dict__, m._parameters, m._buffers)
        for key, value in place.items()
        if key != "training" and not isinstance(value, torch.nn.Module)
    }


def _changed(key, before, after):
    old, new = before.get(key), after.get(key)
    if old is None or new is None or old[0] is not new[0]:
        return True
    if isinstance(old[1], list):
        return len(old[1]) != len(new[1]) or any(a is not b for a, b in zip(old[1], new[1], strict=True))
    if isinstance(old[1], dict):
        return old[1].keys() != new[1].keys() or any(old[1][k] is not new[1][k] for k in new[1])
    return old[1] != new[1]


def _restore(module, key, before):
    """Puts back the attribute a traced forward() set or filled; what it did to a tensor stays done."""
    for place in (module.__dict__, module._parameters, module._buffers):
        if key[1] in place:
            if key in before:
                place[key[1]], content = before[key]
                if isinstance(content, list):
                    place[key[1]][:] = content
                elif isinstance(content, (dict, set)):
                    place[key[1]].clear()
                    place[key[1]].update(content)
            else:
                del place[key[1]]


def _tensors_only(module, required, forms):
    """A subclass of the module's class whose forward() takes tensors alone, a list as several: fx reads signatures."""
    names = required
    if forms is not None:
        names = [[f"x{i}_{j}" for j in range(form)] if form else f"x{i}" for i, form in enumerate(forms)]
    flat = [n for name in names for n in (name if isinstance(name, list) else [name])]
    passed = [f"[{', '.join(name)}]" if isinstance(name, list) else name for name in names]
    scope = {"_as_written": type(module).forward}
    exec(f"def traced({', '.join(['self', *flat])}): return _as_written({', '.join(['self', *passed])})", scope)
    return type(type(module).__name__, (type(module),), {"forward": scope["traced"]})


def trace(module, leaves, training, forms=None, constants=False):
    """The graph of module.forward() for its required arguments, in this mode.

    Args:
        leaves: (module, name) -> bool, the submodules that are called and not traced into.
        training: the mode of every submodule while tracing; None leaves each in its own.
        forms: per argument, 0 for a tensor or the length of a list of tensors. None: tensors.
        constants: allow tensors that forward() makes by itself; they become attributes `_tensor_constant<i>`.

    Raises CannotTrace when forward() depends on values, draws random numbers or changes its module, so that a graph
    would not mean the same; its `where` names the submodule that failed ("" for the module itself).
    """
    required = required_arguments(module)
    modes = [(m, m.training) for m in module.modules()]
    original = type(module)
    before, random_before = _attributes(module), _random_state()
    tracer = Tracer(leaves, _inference_modes if training is None else _training_modes)
    try:
        for m, mode in modes:
            m.__dict__["training"] = mode if training is None else training
        module.__class__ = _tensors_only(module, required, forms)
        graph = tracer.trace(module)
    except Exception as error:
        failure = CannotTrace(str(error).strip().split("\n")[0] or type(error).__name__)
        failure.where = tracer.calling[-1] if tracer.calling else ""
        raise failure from error
    finally:
        module.__class__ = original
        for m, mode in modes:
            m.__dict__["training"] = mode
    after = _attributes(module)
    made = {k for k in after.keys() - before.keys() if k[0] == "" and k[1].startswith("_tensor_constant")}
    changed = [k for k in after.keys() | before.keys() if k not in made and _changed(k, before, after)]
    if changed or (made and not constants):
        for key in (*changed, *made):
            _restore(module.get_submodule(key[0]), key, before)
        raise CannotTrace("its forward() " + ("changes the module" if changed else "makes tensors of its own"))
    if _random_state() != random_before:
        raise CannotTrace("its forward() draws random numbers")
    graph.lint()
    return graph


# ---- what a node does ----------------------------------------------------------------------------------------------

CONVS = (torch.nn.Conv2d, modules.Conv2d)
LINEARS = (torch.nn.Linear, modules.Linear)
NORMS_2D = (torch.nn.BatchNorm2d, modules.BatchNorm2d)
ADDITIONS = (operator.add, operator.iadd, torch.add)


def only_user(node):
    """The one node that reads this one's value; None when there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def mutated(node, module):
    """The argument a node changes in place, or None. `module` is what a call_module node calls."""
    first = node.args[0] if node.args else None
    if node.op == "call_method":
        return first if node.target.endswith("_") and not node.target.endswith("__") else None
    if node.op == "call_module":
        return first if any(getattr(m, "inplace", False) for m in module.modules()) else None
    if node.op != "call_function":
        return None
    if node.kwargs.get("out") is not None:
        return node.kwargs["out"]
    name = getattr(node.target, "__name__", "")
    in_place = node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
    if in_place or node.kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__")):
        return first
    return None


_MAKERS = (
    torch.nn.Conv2d, torch.nn.Linear, torch.nn.modules.batchnorm._BatchNorm, torch.nn.MaxPool2d, torch.nn.AvgPool2d,
)  # fmt: skip


def is_fresh(node, module):
    """Whether the node's value is a new tensor that nobody but its one user can see."""
    if len(node.users) != 1:
        return False
    if node.op == "call_module":
        return isinstance(module, (*_MAKERS, Frozen))
    return node.op == "call_function" and node.target in (operator.add, torch.add, torch.cat)


def quiet_between(first, last, find):
    """Whether no node between the two changes a tensor that others can see, so that `first` may move to `last`."""
    node = first.next
    while node is not last:
        if node.op == "root":
            return False
        target = mutated(node, find(node))
        if target is not None and not (isinstance(target, fx.Node) and is_fresh(target, find(target))):
            return False
        node = node.next
    return True
