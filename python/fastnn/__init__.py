"""Drop-in faster torch.nn layers: the same constructors, parameters and results on C++ kernels of our own."""

from fastnn._load import load as _load

_C = _load()

from fastnn import _fake, _flops, functional, optim  # noqa: E402
from fastnn._compile_cache import tag_cache_keys as _tag_cache_keys  # noqa: E402
from fastnn._decompositions import decompositions  # noqa: E402
from fastnn._fuse import fuse  # noqa: E402
from fastnn.autotune import autotune  # noqa: E402
from fastnn.convert import convert, disabled, report, revert  # noqa: E402
from fastnn.info import fallbacks  # noqa: E402
from fastnn.modules import *  # noqa: E402,F403
from fastnn.modules import __all__ as _module_names  # noqa: E402
from fastnn.optim import clip_grad_norm_  # noqa: E402
from fastnn.precision import set_strict_conv  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "autotune", "clip_grad_norm_", "convert", "decompositions", "disabled", "fallbacks", "functional", "fuse", "optim",
    "report", "revert", "set_strict_conv", *_module_names,
]  # fmt: skip

_tag_cache_keys()
del _fake, _flops
