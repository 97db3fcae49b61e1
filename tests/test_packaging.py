"""The build and the package: which torch it takes, which flags it compiles with, what it installs, what it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch

import fastnn

ROOT = Path(__file__).resolve().parents[1]
TORCH_DIR = Path(torch.__file__).parent


def configure(folder, *definitions):
    """Runs CMake's configuration of fastnn in `folder`."""
    cmake = shutil.which("cmake", path=f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}")
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    settings = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11, "FASTNN_WITH_CUDA": "off"}
    settings.update(d.split("=", 1) for d in definitions)
    command = [cmake, "-S", ROOT, "-B", folder, *(f"-D{k}={v}" for k, v in settings.items())]
    return subprocess.run(command, capture_output=True, text=True)


def refusal(result):
    """The text of CMake's error, on one line."""
    assert result.returncode != 0
    return " ".join(result.stderr.split())


def test_no_torch_stops_with_what_to_type(tmp_path):
    text = refusal(configure(tmp_path, "FASTNN_TORCH_DIR=/nonexistent/torch"))
    assert "there is none in /nonexistent/torch: type `pip install torch`" in text


def test_old_torch_stops_with_what_to_type(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.1+cu126'\n")
    text = refusal(configure(tmp_path / "build", f"FASTNN_TORCH_DIR={tmp_path}/torch"))
    assert "needs torch 2.11 or newer" in text and "2.10.1+cu126" in text and "pip install --upgrade torch" in text


def test_bogus_cuda_setting_names_the_valid_ones(tmp_path):
    text = refusal(configure(tmp_path, "FASTNN_WITH_CUDA=maybe"))
    assert "FASTNN_WITH_CUDA=maybe: choose auto, on, off or compile-only" in text


def test_finds_torch_on_disk_and_compiles_for_any_cpu(tmp_path):
    result = configure(tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"torch {torch.__version__} in {TORCH_DIR}" in result.stdout
    commands = {}
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        commands.setdefault(entry["file"].replace(f"{ROOT}/csrc/", ""), []).append(entry["command"])
    assert commands["kernels/cpu/isa/softmax_forward.cpp"] and commands["ops/softmax.cpp"]
    for name, lines in commands.items():
        for line in lines:
            assert "-march=native" not in line and "-mtune=native" not in line
            assert "-std=gnu++20" in line
            # Kernels cannot include torch or Python: they have no path to them.
            assert (str(TORCH_DIR) in line) == (not name.startswith("kernels/")), name


def test_kernels_include_neither_torch_nor_python():
    for path in (ROOT / "csrc" / "kernels").rglob("*.[hc]*"):
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("#include"):
                assert not any(word in line for word in ("torch", "ATen", "c10", "pybind", "Python")), f"{path}: {line}"


def test_another_torch_is_an_import_error_with_both_versions_and_the_fix():
    code = (
        "import sys, types\n"
        "build = sys.modules['fastnn._build'] = types.ModuleType('fastnn._build')\n"
        "build.TORCH_VERSION, build.CUDA = '2.11.0+cu128', None\n"
        "import fastnn\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode != 0
    assert last.startswith("ImportError: fastnn was built for torch 2.11.0+cu128")
    assert f"under torch {torch.__version__}" in last and "pip install" in last


def test_source_that_is_not_built_says_so(tmp_path):
    unbuilt = shutil.ignore_patterns("_build.py", "_C*.so", "__pycache__")
    shutil.copytree(ROOT / "python" / "fastnn", tmp_path / "fastnn", ignore=unbuilt)
    result = subprocess.run([sys.executable, "-c", "import fastnn"], cwd=tmp_path, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("ImportError: fastnn is not built here: `pip install .`")


def test_package_holds_the_extension_and_nothing_of_the_tests():
    package = Path(fastnn.__file__).parent
    try:
        names = [str(f) for f in files("fastnn") or []]
    except PackageNotFoundError:  # an in-place build
        names = [f"fastnn/{f.relative_to(package)}" for f in package.rglob("*")]
    assert sum(Path(n).match("fastnn/_C*.so") for n in names) == 1
    assert "fastnn/_build.py" in names and "fastnn/py.typed" in names
    tops = {n.split("/")[0] for n in names if not n.startswith("..")}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastnn"}
    assert not any("test" in n or n.endswith((".cpp", ".h")) for n in names)


def test_readme_examples_run():
    text = (ROOT / "README.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert fastnn.fallbacks() == {("max_pool2d", "dtype"): 1}  # as the last example says
    assert isinstance(names["model"][0], fastnn.Linear)


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    listed = text[text.index("## What there is") :]
    for module in (fastnn.functional, fastnn.modules, fastnn.optim):
        for name in module.__all__:
            assert re.search(rf"\b{name}\b", listed), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)\b", text.replace("and make", ""))) <= targets
