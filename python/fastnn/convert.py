"""convert, revert and report: switching the layers of an existing model between torch.nn and fastnn in place."""

import copy
import fnmatch
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils.parametrize import is_parametrized

from fastnn import _C, modules
from fastnn._fuse import layers as _frozen
from fastnn._fuse import train as _fused_training

# torch.nn.Conv2d -> fastnn.Conv2d and so on: a twin is a direct subclass under the same name.
TWINS = {
    twin.__base__: twin
    for twin in (getattr(modules, name) for name in modules.__all__)
    if twin.__base__.__module__.startswith("torch.nn.modules") and twin.__base__.__name__ == twin.__name__
}
_ORIGINALS = {twin: original for original, twin in TWINS.items()}

# Forward pre-hooks that rebuild a parameter before every call: their layers stay as their authors made them.
_REBUILDING_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.prune")


@dataclass(frozen=True)
class LayerReport:
    """One row of report(): a module's name, its type's name, whether it runs on fastnn's kernels, and why not, or what
    it is fused with."""

    name: str
    type: str
    native: bool
    reason: str


def _why_left(module):
    """Why convert() leaves a module as it is, or None when it has a twin and nothing stands in the way."""
    kind = type(module)
    if kind in _ORIGINALS and "forward" in module.__dict__:
        kind = _ORIGINALS[kind]
    if kind not in TWINS:
        base = next((c for c in kind.__mro__ if c in TWINS), None)
        if base is not None:
            return f"a subclass of torch.nn.{base.__name__}"
        return "no fastnn twin"
    if "forward" in module.__dict__:
        return "forward() is replaced on this object"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__ in _REBUILDING_HOOKS:
            return f"its weight is rebuilt by {type(hook).__name__}"
    return None


def _matches(selector, name, module):
    if selector is None:
        return False
    if isinstance(selector, type):
        return isinstance(module, selector)
    if isinstance(selector, str):
        return fnmatch.fnmatchcase(name, selector)
    if callable(selector):
        return bool(selector(name, module))
    return any(_matches(one, name, module) for one in selector)


def convert(model, *, include=None, exclude=None, inplace=True):
    """Makes every layer that has a fastnn twin run on fastnn's kernels.

    A layer whose exact type is, say, torch.nn.Conv2d becomes fastnn.Conv2d by changing its class: the same object with
    the same parameters, buffers, hooks and state_dict keys, so optimizers that hold its parameters stay valid.
    Subclasses, parametrized and weight-normed layers, and layers with a forward() of their own are left alone; nothing
    outside the model is touched. revert() goes back.

    Args:
        model: any torch.nn.Module.
        include: convert only what matches; a type, a name pattern as in fnmatch ("features.*"), a predicate
            (name, module) -> bool, or a list of these. None: everything. A layer that has several names is matched by
            any of them.
        exclude: leave what matches, in the same forms.
        inplace: False converts a deep copy and leaves `model` as it is.

    Returns:
        The converted model.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert() takes a torch.nn.Module, not {type(model).__name__}")
    if not inplace:
        model = copy.deepcopy(model)
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, own in names.items():
        chosen = include is None or any(_matches(include, name, module) for name in own)
        if chosen and not any(_matches(exclude, name, module) for name in own) and _why_left(module) is None:
            module.__class__ = TWINS[type(module)]
    return model


def revert(model):
    """Undoes convert() and a fuse() in training mode: every fastnn layer becomes its torch.nn original again, a
    parametrized one too, and every fused block its own class, in place. Returns the model."""
    for module in model.modules():
        _fused_training.unfuse(module)
        kind = type(module)
        if kind in _ORIGINALS:
            module.__class__ = _ORIGINALS[kind]
        elif kind.__base__ in _ORIGINALS and is_parametrized(module):  # by a class made for it, with a property each
            own = {name: v for name, v in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            original = _ORIGINALS[kind.__base__]
            module.__class__ = type(kind.__name__, (original,), own)
    return model


def _is_native(module):
    """Whether the layer runs a forward() of fastnn's: a subclass, as a parametrized layer is, may have inherited it."""
    source = getattr(getattr(type(module), "forward", None), "__module__", None)
    return "forward" not in module.__dict__ and (source or "").startswith("fastnn.")


def report(model, *, console=None):
    """Prints which layers of a model run on fastnn's kernels and why the others do not.

    Args:
        model: any torch.nn.Module.
        console: a rich Console to print to; None prints to standard output.

    Returns:
        A list of LayerReport in named_modules() order, one for every layer: a module without children, or a subclass
        of a layer that has a twin. Calls that reached a native layer but fell back for their arguments are in
        fastnn.fallbacks().
    """
    rows, joined, inside = [], {}, ""
    for name, module in model.named_modules():
        plan = getattr(module, "_fastnn_plan", None)
        for names in plan.fused if plan else ():
            text = " + ".join(names)
            joined.update((f"{name}.{one}".strip("."), f"fused: {text}") for one in names)
        frozen = isinstance(module, _frozen.Frozen)
        container = next(module.children(), None) is not None and not frozen and not isinstance(module, tuple(TWINS))
        if container or (inside and name.startswith(inside)):
            continue
        inside = f"{name}." if frozen else ""
        native = _is_native(module)
        reason = "" if native else (_why_left(module) or "not converted")
        if frozen:
            native, reason = True, module.describe()
        elif name in joined:
            native, reason = True, joined[name]
        rows.append(LayerReport(name, type(module).__name__, native, reason))
    table = Table(title=f"{sum(r.native for r in rows)} of {len(rows)} layers run on fastnn")
    for column in ("layer", "type", "runs on", "why"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.name, row.type, "fastnn" if row.native else "torch", row.reason)
    (console or Console()).print(table)
    return rows


class disabled:
    """A context manager: inside it, on this thread, fastnn's layers, functionals and optimizers run torch's own.

    For comparing the two on one model without converting it back and forth. Nests; what ran is not counted in
    fastnn.fallbacks(), since it was asked for. Compiled code heeds it, but let torch.compile trace outside of it: a
    graph traced inside keeps some of torch's operators afterwards.
    """

    def __enter__(self):
        self._before = _C.set_enabled(False)
        return self

    def __exit__(self, *exception):
        _C.set_enabled(self._before)
        return False
