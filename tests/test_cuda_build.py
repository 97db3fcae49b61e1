"""The .cu files compile with nvcc, warnings being errors. On a machine without nvcc there is no such test."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROJECT = f"""
cmake_minimum_required(VERSION 3.22)
project(cuda_build LANGUAGES CXX)
find_program(CCACHE ccache)
include({ROOT}/cmake/cuda.cmake)
"""


def configure(folder, **options):
    (folder / "CMakeLists.txt").write_text(PROJECT)
    env = {**os.environ, "TORCH_CUDA_ARCH_LIST": options.pop("arch", "8.0")}
    command = ["cmake", "-S", folder, "-B", folder / "build", *(f"-D{k}={v}" for k, v in options.items())]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)


if shutil.which("nvcc"):

    def test_compile_only(tmp_path):
        """For both architectures in one build: each file is parsed and compiled for the host once."""
        configured = configure(tmp_path, FASTNN_WITH_CUDA="compile-only", arch="8.0 9.0")
        assert configured.returncode == 0, configured.stderr
        build = ["cmake", "--build", tmp_path / "build", "--parallel", os.cpu_count()]
        built = subprocess.run(list(map(str, build)), capture_output=True, text=True)
        assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
        objects = {o.name.removesuffix(".o") for o in tmp_path.rglob("*.cu.o")}
        assert objects == {s.name for s in ROOT.glob("csrc/kernels/cuda/*.cu")} != set()

    @pytest.mark.parametrize(
        ("arch", "architectures"),
        [("8.0 9.0 10.0+PTX", "80-real;90-real;100"), ("9.0a", "90a-real"), ("8.6,8.9+PTX;8.6", "86-real;89")],
    )
    def test_architectures(arch, architectures, tmp_path):
        """One setting names them all; machine code for each, and PTX where it is asked for."""
        configured = configure(tmp_path, FASTNN_WITH_CUDA="compile-only", arch=arch)
        assert configured.returncode == 0, configured.stderr
        assert f"(compile-only) for {architectures}\n" in configured.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"FASTNN_WITH_CUDA": "on", "FASTNN_TORCH_CUDA": ""}, "is a CPU build"),
        ({"FASTNN_WITH_CUDA": "on", "FASTNN_TORCH_CUDA": "13.0", "FASTNN_NVCC": ""}, "needs nvcc"),
        ({"FASTNN_WITH_CUDA": "perhaps"}, "choose auto, on, off or compile-only"),
        ({"FASTNN_WITH_CUDA": "compile-only", "FASTNN_NVCC": "/bin/true", "arch": "sm_90"}, "not of the form 9.0"),
        ({"FASTNN_WITH_CUDA": "compile-only", "FASTNN_NVCC": "/bin/true", "arch": "7.5"}, "8.0 or later"),
    ],
    ids=["cpu-torch", "no-nvcc", "bogus", "bad-arch", "old-arch"],
)
def test_clear_errors(options, message, tmp_path):
    configured = configure(tmp_path, **options)
    assert configured.returncode != 0
    assert message in " ".join(configured.stderr.split())


@pytest.mark.parametrize(
    "options", [{"FASTNN_WITH_CUDA": "off"}, {"FASTNN_WITH_CUDA": "auto", "FASTNN_TORCH_CUDA": ""}]
)
def test_cpu_build_needs_no_nvcc(options, tmp_path):
    configured = configure(tmp_path, **options)
    assert configured.returncode == 0, configured.stderr
    assert "CUDA compiler" not in configured.stdout
