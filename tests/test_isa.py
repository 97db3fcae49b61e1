"""Every instruction set of this build, forced and proven to have run."""

import os
import subprocess
import sys

import pytest
import torch
from cases import ALL
from compare import compare

import fastnn

ISAS = fastnn._C.isas()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_case_on_isa(case, isa):
    assert fastnn._C.set_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare(case, dtype)
    # isa() is a string compiled into that ISA's own objects, next to the kernels' addresses.
    assert fastnn._C.isa() == isa


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_isa(isa):
    result = python("import fastnn; print(fastnn._C.isa())", FASTNN_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_bogus_isa_is_an_import_error():
    result = python("import fastnn", FASTNN_ISA="avx1024")
    assert result.returncode != 0
    assert "ImportError: FASTNN_ISA='avx1024'" in result.stderr
    assert all(isa in result.stderr.splitlines()[-1] for isa in ISAS)
