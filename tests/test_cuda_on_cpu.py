"""Every CUDA kernel, compiled by g++ and run on the CPU (tests/cuda_on_cpu) against the CPU kernel of its family."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "kernels"
RUNTIME = ROOT / "tests" / "cuda_on_cpu"

WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function"]
SANITIZE = [
    "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
    "-fno-strict-aliasing",
]
RUNTIME_INCLUDE = ["-I", str(RUNTIME)]
# Not optimised: compiling these took most of the test's time, running them takes next to none of it.
CPU_KERNEL = [
    "-O0",
    "-DFASTNN_ISA_NS=isa_baseline",
    '-DFASTNN_ISA_NAME="baseline"',
    "-fno-exceptions",
    "-fno-math-errno",
]


def sources():
    """(source, options) of the program: CUDA kernels, runtime and tests under the sanitizers, CPU kernels plain."""
    for source in sorted(KERNELS.glob("cuda/*.cu")):
        yield source, ["-x", "c++", *RUNTIME_INCLUDE, *SANITIZE]
    for source in sorted(RUNTIME.glob("*.cpp")):
        yield source, [*RUNTIME_INCLUDE, *SANITIZE]
    for source in sorted(KERNELS.glob("cpu/isa/*.cpp")):
        yield source, CPU_KERNEL
    yield KERNELS / "cpu" / "dispatch.cpp", []


def run(*command):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, f"{command[0]} failed:\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Builds the program: every CUDA kernel, the runtime, the tests, and the baseline CPU kernels to compare with."""
    build = tmp_path_factory.mktemp("cuda_on_cpu")
    compiler = [*filter(None, [shutil.which("ccache")]), os.environ.get("CXX", "g++")]

    def compile_one(item):
        i, (source, options) = item
        run(*compiler, "-std=gnu++20", "-O1", *WARNINGS, *options, "-c", source, "-o", build / f"{i}.o")
        return build / f"{i}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, enumerate(sources())))
    run(*compiler, "-no-pie", *SANITIZE, *objects, "-o", build / "cuda_on_cpu")
    return build / "cuda_on_cpu"


# What the runtime says about each bug of planted.cpp.
PLANTED = {
    "missing_barrier": "a race: the order matters",
    "divergent_barrier": "a barrier or warp operation that some threads never reach",
    "shared_out_of_bounds": "heap-buffer-overflow",
    "shared_uninitialised": "array 0 differs at 63: -nan",
    "global_out_of_bounds": "heap-buffer-overflow",
    "unwritten_output": "array 0 differs at 0: -nan",
    "misaligned_pack": "misaligned address",
    "missing_lanes": "a barrier or warp operation that some threads never reach",
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(program, bug):
    result = subprocess.run([program, f"planted {bug}"], capture_output=True, text=True)
    assert result.returncode != 0
    assert PLANTED[bug] in result.stdout + result.stderr


def test_every_kernel_against_the_cpu(program, capsys):
    result = subprocess.run([program], capture_output=True, text=True)
    output = result.stdout
    wrong = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert result.returncode == 0, "\n".join([*wrong[:40], result.stderr[-4000:]])
    cases, cut, failed = map(int, re.search(r"(\d+) cases, (\d+) cut, (\d+) failed", output).groups())
    assert failed == 0 and cases > cut > 0

    # Every __global__ function of the .cu files, every instantiation of it, has run.
    names = {}
    for line in run("nm", "-C", program).splitlines():
        address, kind, name = line.split(" ", 2)
        if kind in "tTW" and re.search(r"fastnn::cuda::.*_kernel[<(]", name) and "lambda" not in name:
            names[int(address, 16)] = re.sub(r"\(anonymous namespace\)::|^void ", "", name).split("(")[0]
    ran = {int(address, 16) for address in re.findall(r"kernel (0x[0-9a-f]+)", output)}
    assert ran <= names.keys()
    never = sorted(names[a] for a in names.keys() - ran)
    assert not never, f"kernels that no case of tests/cuda_on_cpu runs: {never}"

    sources_ = {re.sub("<.*", "", n) for n in names.values()}
    with capsys.disabled():
        text = f"{cases} cases ({cut} of them also cut into short launches)"
        print(f"\ncuda_on_cpu: {text} ran {len(ran)} instantiations of {len(sources_)} kernels")
