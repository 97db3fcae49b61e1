"""A frozen copy of a model for inference: batch norms folded into products, what follows them joined to them."""

import dataclasses
import inspect
import operator

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from fastnn import modules
from fastnn._fuse import layers
from fastnn._fuse.trace import (
    ADDITIONS,
    CONVS,
    LINEARS,
    NORMS_2D,
    fields_of,
    is_fresh,
    is_library,
    is_plain,
    mutated,
    only_user,
    quiet_between,
)
from fastnn.modules._script import refuse_script
from fastnn.modules._trace import Proxy, recorded

NORMS_1D = (torch.nn.BatchNorm1d, modules.BatchNorm1d)
DROPPED = (
    torch.nn.Identity, torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
)  # fmt: skip
ACTIVATIONS = {
    torch.nn.ReLU: "relu", modules.ReLU: "relu", torch.nn.ReLU6: "relu6", modules.ReLU6: "relu6",
    torch.nn.SiLU: "silu", modules.SiLU: "silu", torch.nn.Hardswish: "hardswish",
}  # fmt: skip
ACTIVATION_FUNCTIONS = {
    torch.relu: "relu", torch.relu_: "relu", torch.nn.functional.relu: "relu", torch.nn.functional.relu_: "relu",
    torch.nn.functional.relu6: "relu6", torch.nn.functional.silu: "silu", torch.nn.functional.hardswish: "hardswish",
}  # fmt: skip
LABELS = {"relu": "ReLU", "relu6": "ReLU6", "silu": "SiLU", "hardswish": "Hardswish"}


def _is_channels_last(t):
    """By its strides alone, as torch reads those of crops and of a 1x1 weight too."""
    if t.dim() != 4 or t.numel() == 0:
        return False
    _, c, h, w = t.shape
    image, channel, line, pixel = t.stride()
    nested = 0 < channel * c <= pixel and pixel * w <= line and line * h <= image
    return nested and channel != line * h  # equal for images of one element: either layout


def _tensors(arguments):
    """The tensors among a call's arguments, those in lists and other containers too."""
    if all(isinstance(a, torch.Tensor) for a in arguments):
        return arguments
    return [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]


def _forward_of(body):
    """FrozenModel.forward() for one body, with its arguments by name."""
    arguments = inspect.signature(body.forward).parameters if isinstance(body, fx.GraphModule) else ()
    arguments = ", ".join(arguments) or "*args, **kwargs"
    scope = {}
    exec(f"def forward(self, {arguments}): return self._run({arguments})", scope)
    return scope["forward"]


class FrozenModel(torch.nn.Module):
    """What fuse() returns for a model in evaluation: `body` computes what the model did, for inference only.

    Each is of a class of its own, as fx.GraphModules are: torch.fx reads the arguments off the class's forward(), and
    Dynamo compiles the same code but for a few classes.
    """

    def __new__(cls, body):
        names = {"forward": _forward_of(body), "__module__": cls.__module__, "__doc__": cls.__doc__}
        return super().__new__(type(cls.__name__, (FrozenModel,), names))

    def __init__(self, body):
        super().__init__()
        self.body = body
        super().train(False)

    __prepare_scriptable__ = refuse_script

    def __reduce_ex__(self, protocol):
        return FrozenModel, (self.body,), self.__dict__

    def _run(self, *args, **kwargs):
        if args and type(args[0]) is Proxy:
            return self.body(*args, **kwargs) if args[0].tracer.root is self else recorded(self, *args)
        tensors = _tensors((*args, *kwargs.values()))
        if not torch.is_grad_enabled():
            result = self.body(*args, **kwargs)
        elif any(t.requires_grad for t in tensors):
            raise RuntimeError("a model fused in evaluation mode has no gradients; call fuse() on it in training mode")
        else:
            with torch.no_grad():
                result = self.body(*args, **kwargs)
        return result if any(map(_is_channels_last, tensors)) else self._as_torch_leaves_it(result)

    def _as_torch_leaves_it(self, result):
        if isinstance(result, torch.Tensor):  # tree_map takes 5 us to find out
            return self._leaf_as_torchs(result)
        return tree_map(self._leaf_as_torchs, result, is_leaf=lambda value: isinstance(value, torch.Size))

    def _leaf_as_torchs(self, value):
        """A convolution's result is channels_last in torch where its weight is."""
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            given, rest = fields_of(value, self._as_torch_leaves_it)
            return layers.with_fields(type(value)(**given), rest)
        if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.is_contiguous():
            return value
        return value if any(map(_is_channels_last, self.buffers())) else value.contiguous()

    def train(self, mode=True):
        if mode:
            raise RuntimeError("a model fused in evaluation mode is frozen; train the one it was made from")
        return self


def _norms_by_statistics(norm):
    return not norm.training and norm.running_mean is not None and norm.running_var is not None


class _Freezer:
    """The passes over one graph; `root` holds the modules its nodes name."""

    def __init__(self, root, graph):
        self.root, self.graph = root, graph
        self.frozen = {}  # node -> its frozen layer

    def find(self, node):
        if node in self.frozen:
            return self.frozen[node]
        return self.root.get_submodule(node.target) if node.op == "call_module" else None

    def run(self):
        self.drop_identities()
        self.free_layouts()
        for node in list(self.graph.nodes):
            self.freeze(node)
            self.freeze_norm_function(node)
        self.lift_ranks()
        for node in list(self.frozen):
            self.fold_norm(node)
        for node in list(self.frozen):
            self.join(node)
        for node in list(self.frozen):
            self.join_norm(node)
        self.share_concatenations()
        self.name_layers()
        self.graph.lint()

    def drop_identities(self):
        for node in list(self.graph.nodes):
            module = self.find(node)
            dropout = node.op == "call_function" and node.target is torch.nn.functional.dropout
            if dropout:
                training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            if (module is not None and is_plain(module, DROPPED)) or (dropout and training is False):
                node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
                self.graph.erase_node(node)

    def free_layouts(self):
        """Frozen convolutions answer in channels_last: a view of their output may need a copy, and foreign code gets
        the layout it knows."""
        for node in list(self.graph.nodes):
            module = self.find(node)
            if node.op == "call_method" and node.target == "view":
                node.target = "reshape"
            if module is None or is_library(module):
                continue
            for argument in node.all_input_nodes:
                with self.graph.inserting_before(node):
                    plain = self.graph.call_function(layers.contiguous, (argument,))
                node.replace_input_with(argument, plain)

    def freeze(self, node):
        module = self.find(node)
        if module is None or len(node.args) != 1 or node.kwargs:
            return
        if is_plain(module, CONVS):
            self.frozen[node] = layers.FrozenConv2d(module)
        elif is_plain(module, LINEARS):
            self.frozen[node] = layers.FrozenLinear(module)
        elif is_plain(module, NORMS_2D + NORMS_1D) and _norms_by_statistics(module):
            m = module
            values = m.running_mean, m.running_var, m.weight, m.bias, m.eps
            self.frozen[node] = layers.FrozenBatchNorm(type(m).__name__, *values)

    def freeze_norm_function(self, node):
        """torch.nn.functional.batch_norm on attributes of the model, as subclasses of BatchNorm2d call it."""
        if node.op != "call_function" or node.target is not torch.nn.functional.batch_norm:
            return
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        values = [given.get(name) for name in names[1:5]]
        if given.get("training", False) is not False or any(v is not None and v.op != "get_attr" for v in values):
            return
        tensors = [v if v is None else operator.attrgetter(v.target)(self.root) for v in values]
        if tensors[0] is None or tensors[1] is None:
            return
        layer, name = layers.FrozenBatchNorm("batch_norm", *tensors, given.get("eps", 1e-5)), f"{node.name}_frozen"
        self.root.add_submodule(name, layer)
        with self.graph.inserting_before(node):
            called = self.graph.call_module(name, (given["input"],))
        node.replace_all_uses_with(called)
        self.graph.erase_node(node)
        for v in values:
            if v is not None and not v.users:
                self.graph.erase_node(v)
        self.frozen[called] = layer

    def lift_ranks(self):
        """Asking a layer's output for its rank asks its input instead: the same number, and one user less."""
        for node in self.graph.nodes:
            reads = node.op == "call_function" and node.target is getattr and node.args[1] == "ndim"
            if reads or (node.op == "call_method" and node.target == "dim"):
                of = node.args[0]
                while of in self.frozen:
                    of = of.args[0]
                node.args = (of, *node.args[1:])

    def absorb(self, node, last, residual=None):
        """Node moves to the place of `last`, whose value it now computes."""
        with self.graph.inserting_before(last):
            inputs = (node.args[0],) if residual is None else (node.args[0], residual)
            moved = self.graph.call_module(node.target, inputs)
        last.replace_all_uses_with(moved)
        self.frozen[moved] = self.frozen.pop(node)
        return moved

    def fold_norm(self, node):
        layer, user = self.frozen.get(node), only_user(node)
        norm = self.frozen.get(user)
        if not isinstance(norm, layers.FrozenBatchNorm) or not self.is_product(node):
            return
        # A function or BatchNorm2d behind a linear layer is not over its features.
        if isinstance(layer, layers.FrozenLinear) != (norm.fused == ["BatchNorm1d"]):
            return
        if norm.running_mean.dtype != layer.weight.dtype or norm.running_mean.shape[0] != layer.weight.shape[0]:
            return
        if not quiet_between(node, user, self.find):
            return
        layers.fold(layer, norm)
        self.absorb(node, user)
        del self.frozen[user]
        for old in (user, node):
            self.graph.erase_node(old)

    def activation_of(self, user, node):
        """The name of the activation that `user` applies to node's value, or ""."""
        if user is None or not user.args or user.args[0] is not node:
            return ""
        if user.op == "call_module":
            module = self.find(user)
            if is_plain(module, (torch.nn.Hardtanh,)):
                return "relu6" if (module.min_val, module.max_val) == (0, 6) else ""
            return ACTIVATIONS.get(type(module), "") if is_plain(module, ACTIVATIONS) else ""
        if user.op == "call_method":
            return "relu" if user.target in ("relu", "relu_") else ""
        plain = user.op == "call_function" and len(user.args) == 1 and not set(user.kwargs) - {"inplace"}
        return ACTIVATION_FUNCTIONS.get(user.target, "") if plain else ""

    def is_product(self, node):
        return isinstance(self.frozen.get(node), (layers.FrozenConv2d, layers.FrozenLinear))

    def residual_of(self, user, node):
        """What `user` adds to the value of a convolution or linear layer, when the layer can do it instead."""
        if not self.is_product(node) or user is None or user.op != "call_function" or user.target not in ADDITIONS:
            return None
        others = [a for a in user.args if a is not node]
        if user.kwargs or len(user.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        other = others[0]
        if user.target is operator.iadd and user.args[0] is other and not is_fresh(other, self.find(other)):
            return None  # others see the sum
        if node < other and self.is_product(other) and len(other.users) == 1:
            return None  # the later of two layers adds
        return other if quiet_between(node, user, self.find) else None

    def join(self, node):
        """Joins an addition and an activation to a frozen layer."""
        if node not in self.frozen:
            return
        layer, user = self.frozen[node], only_user(node)
        residual = self.residual_of(user, node)
        if residual is not None:
            moved = self.absorb(node, user, residual)
            for old in (user, node):
                self.graph.erase_node(old)
            layer.fused.append("add")
            node, user = moved, only_user(moved)
        activation = self.activation_of(user, node)
        if not activation or (activation != "relu" and isinstance(layer, layers.FrozenBatchNorm)):
            return
        if not quiet_between(node, user, self.find):
            return
        residual = node.args[1] if len(node.args) > 1 else None
        self.absorb(node, user, residual)
        for old in (user, node):
            self.graph.erase_node(old)
        layer.activation = activation
        layer.fused.append(LABELS[activation])

    def join_norm(self, node):
        """Puts a norm and its ReLU into the 1x1 convolution behind them."""
        norm, user = self.frozen.get(node), only_user(node)
        conv = self.frozen.get(user)
        if not isinstance(norm, layers.FrozenBatchNorm) or not isinstance(conv, layers.FrozenConv2d):
            return
        plain = conv.stride in (1, (1, 1)) and conv.padding in (0, (0, 0)) and conv.groups == 1 and conv.norm is None
        if norm.activation != "relu" or not plain or conv.weight.shape[2:] != (1, 1) or user.args[0] is not node:
            return
        if not quiet_between(node, user, self.find):
            return
        conv.put_behind(norm)
        user.args = (node.args[0], *user.args[1:])
        self.graph.erase_node(node)
        del self.frozen[node]

    def share_concatenations(self):
        """Concatenations that begin with all of an earlier one (DenseNet's) grow one tensor instead of copying it."""
        chain = []  # (node, inputs) of concatenations along the channels, each beginning with the one before
        for node in list(self.graph.nodes):
            inputs = self.concatenated(node)
            if inputs is None:
                continue
            if chain and len(inputs) > len(chain[-1][1]) and inputs[: len(chain[-1][1])] == chain[-1][1]:
                chain.append((node, inputs))
                continue
            self.grow(chain)
            chain = [(node, inputs)]
        self.grow(chain)

    def concatenated(self, node):
        """What torch.cat(..., 1) joins, when nobody changes the result in place."""
        if node.op != "call_function" or node.target is not torch.cat:
            return None
        dimension = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        inputs = node.args[0] if node.args else None
        if dimension != 1 or set(node.kwargs) - {"dim"} or not inputs:
            return None
        if not isinstance(inputs, (list, tuple)) or not all(isinstance(i, fx.Node) for i in inputs):
            return None
        return None if any(mutated(user, self.find(user)) is node for user in node.users) else list(inputs)

    def grow(self, chain):
        """Room for what comes later is known where frozen convolutions make it."""
        if len(chain) < 2:
            return
        later = chain[-1][1][len(chain[0][1]) :]
        if not all(isinstance(self.frozen.get(i), layers.FrozenConv2d) for i in later):
            return
        more = {i: self.frozen[i].weight.shape[0] for i in later}
        before, joined = None, []
        for node, inputs in chain:
            new = inputs[len(joined) :]
            joined = inputs
            left = sum(more[i] for i in later if i not in joined)
            with self.graph.inserting_before(node):
                arguments = (new, left) if before is None else (before, new, left)
                function = layers.concatenate if before is None else layers.append
                before = self.graph.call_function(function, arguments)
            node.replace_all_uses_with(before)
            self.graph.erase_node(node)

    def name_layers(self):
        """Puts the frozen layers into the module tree, under the names their products had."""
        taken = {}
        for node, layer in self.frozen.items():
            count = taken[node.target] = taken.get(node.target, -1) + 1
            if count:
                node.target = f"{node.target}_{count}"  # one module called in several places
            self.root.add_submodule(node.target, layer)
