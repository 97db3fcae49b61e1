"""Loads the compiled extension: checks the torch it was built for first, then applies FASTNN_ISA."""

import importlib
import os

import torch

try:
    from fastnn import _build
except ImportError:
    raise ImportError(
        "fastnn is not built here: `pip install .` in its source folder installs it, `make develop` builds it in place."
    ) from None


def _release(version):
    """The release part of a version, "2.13.0" of "2.13.0+cpu": a release's CPU and CUDA wheels share their C++ ABI."""
    return version.split("+")[0]


def load():
    """Returns the module fastnn._C.

    Raises:
        ImportError: the installed torch is not the release fastnn was built for, or FASTNN_ISA names an instruction
            set that this build or this CPU does not have.
    """
    if _release(torch.__version__) != _release(_build.TORCH_VERSION):
        raise ImportError(
            f"fastnn was built for torch {_build.TORCH_VERSION} and cannot load under torch {torch.__version__}: "
            "rebuild it against this torch with `pip install --force-reinstall --no-deps .` in fastnn's source, "
            f"or install torch {_release(_build.TORCH_VERSION)}."
        )
    extension = importlib.import_module("fastnn._C")
    isa = os.environ.get("FASTNN_ISA")
    if isa and not extension.set_isa(isa):
        raise ImportError(
            f"FASTNN_ISA={isa!r} is not an instruction set this build and this CPU can run; "
            f"choose one of: {', '.join(extension.isas())}."
        )
    return extension
