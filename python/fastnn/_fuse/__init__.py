"""fuse(): neighbouring layers of an existing model run as one."""

import copy
import warnings

import torch
from torch import fx

from fastnn._fuse import frozen, train
from fastnn._fuse.trace import CannotTrace, has_hooks, is_library, trace


def _freeze(module, name, left):
    """The frozen form of a module: a GraphModule, or, where fx fails or a hook looks at its calls, the module itself
    with its children frozen."""
    if is_library(module) or next(module.children(), None) is None:
        return module
    stays = set()  # names of submodules that cannot be traced into

    def leaves(m, path):
        kept = path in stays or has_hooks(m) or "forward" in m.__dict__ or isinstance(m, torch.jit.ScriptModule)
        return is_library(m) or kept

    graph = None
    while graph is None and not has_hooks(module):
        try:
            graph = trace(module, leaves, None, constants=True)
        except CannotTrace as reason:
            inner = f"{name}.{reason.where}".strip(".") if reason.where else name
            left.append((inner, str(reason)))
            if not reason.where or reason.where in stays:
                break
            stays.add(reason.where)
    if graph is None:
        for key, child in module.named_children():
            setattr(module, key, _freeze(child, f"{name}.{key}".strip("."), left))
        return module
    body = fx.GraphModule(module, graph, type(module).__name__)
    for node in list(graph.nodes):
        if node.op == "call_module":
            child = body.get_submodule(node.target)
            if not is_library(child) and next(child.children(), None) is not None:
                body.add_submodule(node.target, _freeze(child, f"{name}.{node.target}".strip("."), left))
    freezer = frozen._Freezer(body, body.graph)
    freezer.run()
    body.delete_all_unused_submodules()
    for key, value in vars(module).items():  # a block around it that stays as written may read them
        if not key.startswith("_"):
            vars(body).setdefault(key, value)
    body.recompile()
    return body


def _warn(left, consequence):
    if left:
        lines = "".join(f"\n  {name or 'the model itself'}: {reason}" for name, reason in left)
        warnings.warn(f"fastnn.fuse: torch.fx cannot trace everything; {consequence}:{lines}", stacklevel=3)


def fuse(model):
    """Runs neighbouring layers as one. What that means depends on the model's mode.

    In training mode (`model.training`) the model itself changes, and fastnn.revert() undoes it: in every block,
    BatchNorm2d + ReLU and BatchNorm2d + addition + ReLU become one call, forward and backward, and a ReLU behind a
    convolution or a linear layer overwrites its output. Parameters, buffers, state_dict keys and all layers stay the
    objects they were. Layers with hooks run one by one, so that every hook sees what it always saw.

    In evaluation mode a frozen copy is returned, for inference alone (a gradient raises): batch norms are folded into
    the convolution or linear layer before them, additions and activations are joined to it, and weights are stored as
    the kernels read them. Changing the model afterwards does not change the copy. Outputs are those of the model up to
    the rounding of the folded weights and, where a convolution runs by Winograd's algorithm, the bound that
    fastnn.set_strict_conv() names.

    Layers of torch.nn and of fastnn are fused alike; convert() beforehand moves the others to fastnn as well.

    Args:
        model: any torch.nn.Module. Blocks whose forward() torch.fx cannot trace (it branches on values, draws random
            numbers or changes its module) stay as they are, the blocks inside them are fused, and a warning names them.

    Returns:
        The model (training mode) or the frozen copy (evaluation mode), for which report() tells what is fused.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fuse() takes a torch.nn.Module, not {type(model).__name__}")
    if model.training:
        _warn(train.fuse(model), "these blocks stay as they are")
        return model
    if isinstance(model, frozen.FrozenModel):
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        train.unfuse(module)
    left = []
    with torch.no_grad():
        body = _freeze(model, "", left)
    _warn(left, "these run as they are, and only the parts of them are fused")
    return frozen.FrozenModel(body)
