"""Fusing a model for training, in place: the forward() of a block is replaced by the same calls with neighbours joined.

Only blocks (modules with children) change, and only by class: every layer stays the object it was, with its parameters,
keys and hooks. Whether a pair can run as one is asked again at each call, so that a hook added later still fires.
"""

import functools
import itertools
import operator

import torch
from torch import fx

from fastnn import functional as F
from fastnn import modules
from fastnn._fuse.trace import (
    ADDITIONS,
    CONVS,
    LINEARS,
    NORMS_2D,
    CannotTrace,
    is_library,
    is_plain,
    only_user,
    quiet_between,
    required_arguments,
    trace,
)
from fastnn.modules._script import refuse_script
from fastnn.modules.batch_norm import _apply

RELUS = (torch.nn.ReLU, modules.ReLU)
PRODUCTS = CONVS + LINEARS
RELU_FUNCTIONS = (torch.relu, torch.relu_, torch.nn.functional.relu, torch.nn.functional.relu_)
LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)


def _activate(relu, x):
    return torch.nn.functional.relu(x) if relu is None else relu(x)


# ---- the joined calls: `relu` is the module that was called, or None for the function ------------------------------


def norm_relu(norm, relu, x):
    if is_plain(norm, NORMS_2D) and (relu is None or is_plain(relu, RELUS)):
        return _apply(norm, F.batch_norm_relu, x)
    return _activate(relu, norm(x))


def norm_add_relu(norm, relu, x, residual):
    if is_plain(norm, NORMS_2D) and (relu is None or is_plain(relu, RELUS)) and residual.shape == x.shape:
        return _apply(norm, F.batch_norm_add_relu, x, residual)
    return _activate(relu, norm(x) + residual)


def product_relu(layer, relu, x):
    """The activation overwrites the product's own output: no second tensor, and backward needs but one."""
    if is_plain(layer, PRODUCTS) and (relu is None or is_plain(relu, RELUS)):
        return F.relu(layer(x), True)
    return _activate(relu, layer(x))


# ---- finding them --------------------------------------------------------------------------------------------------


def _added(addition, node):
    """What a node adds to another's value, or None when it does something else, or changes what it adds."""
    if addition.op != "call_function" or addition.target not in ADDITIONS or addition.kwargs or len(addition.args) != 2:
        return None
    others = [a for a in addition.args if a is not node]
    changes_other = addition.target is operator.iadd and addition.args[0] is not node
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) and not changes_other else None


def _rewrite(module, graph):
    """Joins what can be joined in the graph of a block; returns the names that run as one."""
    find = lambda node: module.get_submodule(node.target) if node.op == "call_module" else None  # noqa: E731
    calls = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1

    def relu_after(node):
        """The node of a ReLU that is all that happens to this one's value."""
        user = only_user(node)
        if user is None or len(user.args) < 1 or user.args[0] is not node:
            return None
        if user.op == "call_module" and is_plain(find(user), RELUS):
            return user
        if user.op == "call_method" and user.target in ("relu", "relu_"):
            return user
        return user if user.op == "call_function" and user.target in RELU_FUNCTIONS else None

    fused = []
    for node in list(graph.nodes):
        layer = find(node)
        if layer is None or len(node.args) != 1 or node.kwargs or calls[node.target] > 1:
            continue
        x, names, residual, function = node.args[0], [node.target], None, None
        last = relu_after(node)
        if is_plain(layer, NORMS_2D):
            function = norm_relu
            addition = only_user(node)
            if last is None and addition is not None and _added(addition, node) is not None:
                last, residual, function = relu_after(addition), _added(addition, node), norm_add_relu
                names.append("add")
        elif is_plain(layer, PRODUCTS):
            function = product_relu
        if function is None or last is None or not quiet_between(node, last, find):
            continue
        names.append(last.target if last.op == "call_module" else "relu")
        with graph.inserting_before(last):
            first = graph.get_attr(node.target)
            relu = graph.get_attr(last.target) if last.op == "call_module" else None
            joined = graph.call_function(function, (first, relu, x) + ((residual,) if residual is not None else ()))
        last.replace_all_uses_with(joined)
        for old in (last, *([addition] if residual is not None else []), node):
            graph.erase_node(old)
        fused.append(tuple(names))
    return fused


def _form(argument):
    """How an argument looks to a trace: 0 for a tensor, n for a list or tuple of n tensors, None for anything else."""
    if isinstance(argument, torch.Tensor):
        return 0
    if type(argument) in (list, tuple) and argument and all(isinstance(a, torch.Tensor) for a in argument):
        return len(argument)
    return None


def _flat(arguments):
    return [t for a in arguments for t in ([a] if isinstance(a, torch.Tensor) else a)]


def _names(module):
    """The names of a block's layers, those in its lists too: a trace knows none that was added since."""
    lists = [tuple(m._modules) for m in module._modules.values() if type(m) in LISTS]
    return tuple(module._modules), *lists


class Plan:
    """What a fused block runs: a function per mode, form of the arguments and layers, made at the first such call."""

    def __init__(self):
        # (training, with gradients, forms, names of layers) -> a function of (self, *tensors), or None: as written
        self.functions = {}
        self.fused = ()
        self.arguments = 0

    def __getstate__(self):  # functions are not pickled
        return {"fused": self.fused, "arguments": self.arguments}

    def __setstate__(self, state):
        self.__dict__.update(state, functions={})

    def function(self, module, arguments):
        forms = tuple(map(_form, arguments))
        modes = module.training, torch.is_grad_enabled(), forms
        key = *modes, _names(module)
        if key not in self.functions:
            if None in forms or len(forms) != self.arguments or torch.compiler.is_compiling():
                return None
            try:
                self.functions[key], fused = _compile(module, *modes)
                self.fused = tuple(fused) or self.fused
            except CannotTrace:
                self.functions[key] = None
        return self.functions[key]


def _compile(module, training, grad, forms):
    """The joined forward() of a block in these modes and what it joins; (None, ()) when there is nothing to join."""
    fused_kind = type(module)
    module.__class__ = _originals.get(fused_kind, fused_kind)
    try:
        with torch.set_grad_enabled(grad):
            graph = trace(module, lambda m, name: True, training, forms)
        fused = _rewrite(module, graph)
    finally:
        module.__class__ = fused_kind
    if not fused:
        return None, ()
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"], fused


_classes = {}  # a block's class -> its fused subclass
_originals = {}


def _rebuild(original):
    kind = fused_class(original)
    return kind.__new__(kind)


def fused_class(original):
    """The subclass of a block's class that runs a Plan; the same name, so that repr stays."""
    if original in _classes:
        return _classes[original]

    def forward(self, *args, **kwargs):
        function = None if kwargs else self._fastnn_plan.function(self, args)
        if function is not None:
            return function(self, *_flat(args))
        return original.forward(self, *args, **kwargs)

    forward.__code__ = forward.__code__.replace()  # its own: Dynamo compiles the same code but for a few classes

    @functools.wraps(original.__init__)
    def __init__(self, *args, **kwargs):  # of a new block, as Sequential's slices are: it has no plan
        self.__class__ = original
        self.__init__(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _rebuild, (original,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    names = {"forward": forward, "__init__": __init__, "__reduce_ex__": __reduce_ex__}
    names |= {"__prepare_scriptable__": refuse_script}
    names |= {"__module__": original.__module__, "__doc__": original.__doc__}
    kind = type(original.__name__, (original,), names)
    _classes[original], _originals[kind] = kind, original
    return kind


def _prepare(module, plan):
    """The plan's functions for tensors, or for a list of tensors where the forward() wants one."""
    for forms in ((0,) * plan.arguments, (2,)):
        try:
            for training, grad in itertools.product((True, False), repeat=2):
                modes = training, grad, forms
                plan.functions[(*modes, _names(module))], fused = _compile(module, *modes)
                plan.fused = plan.fused or tuple(fused)
            return
        except CannotTrace:
            if plan.arguments != 1 or forms == (2,):
                raise


def fuse(model):
    """Fuses every block of the model in place. Returns (name, why not) of blocks with layers to join that stay."""
    left = []
    for name, module in list(model.named_modules()):
        if next(module.children(), None) is None or is_library(module) or hasattr(module, "_fastnn_plan"):
            continue
        if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)) or "forward" in module.__dict__:
            continue
        if not any(type(m) in NORMS_2D + PRODUCTS for m in module.children()):
            continue
        plan = Plan()
        try:
            plan.arguments = len(required_arguments(module))
            _prepare(module, plan)
        except CannotTrace as reason:
            left.append((name, str(reason)))
            continue
        if plan.fused:
            module._fastnn_plan = plan
            module.__class__ = fused_class(type(module))
    return left


def unfuse(module):
    """Undoes fuse() on one block; True when it was one."""
    if type(module) not in _originals:
        return False
    module.__class__ = _originals[type(module)]
    del module._fastnn_plan
    return True
