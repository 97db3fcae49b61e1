"""benches/cuda_report.py, which a CUDA device runs, in a dry run on the CPU: no typo shall cost time on a device."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Stands for compute-sanitizer: takes its options away, as that does, and keeps what it is to run; runs it for one tool.
SANITIZER = """#!/bin/sh
tool=$2
while [ "${1#-}" != "$1" ]; do shift 2; done
echo "$@" > "$0.$tool"
[ "$tool" != memcheck ] || exec "$@"
"""


def arguments(tmp_path, *options, seconds=600):
    until = str(time.time() + seconds)
    return ["--out", str(tmp_path / "report.json"), "--device", "cpu", "--until", until, *options]


@pytest.fixture
def report(tmp_path, monkeypatch, capfd):
    """A function that runs the script in this process: (exit code, what it printed, the file)."""
    monkeypatch.syspath_prepend(ROOT / "benches")
    import cuda_report

    def run(*options, sanitizer=SANITIZER):
        (tmp_path / "bin").mkdir()
        if sanitizer:
            (tmp_path / "bin" / "compute-sanitizer").write_text(sanitizer)
            (tmp_path / "bin" / "compute-sanitizer").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        code = cuda_report.main(arguments(tmp_path, *options))
        return code, capfd.readouterr().out, json.loads((tmp_path / "report.json").read_text())

    return run


def test_every_row_of_the_sweep_works(report):
    """Every row is built, its result is compared with torch's, and it is timed."""
    code, output, content = report("--steps", "sweep,choices")
    sweep, choices = content["steps"]["sweep"], content["steps"]["choices"]
    assert code == 0, "\n".join(line for line in output.splitlines() if line.startswith("FAILED")) or output
    assert content.keys() >= {"device", "driver", "torch", "cuDNN", "date", "commit", "allow_tf32"}
    assert sweep["not begun"] == choices["not begun"] == []
    assert len({row["name"] for row in sweep["rows"]}) == len(sweep["rows"])
    for row in sweep["rows"]:
        assert row["goal"] > 0 and row["ratio"] > 0 and row["seconds"] > 0
    assert len(sweep["rows"]) > len(choices["rows"]) > 0
    assert all("product" in row["name"] for row in choices["rows"]) and choices["choices"] == {}


GOALS = {  # what a row's name contains, and its goal: the ones docs/cuda.md lists
    "max_pool2d 3x3/2 forward+backward NCHW float32": 1.3,
    "max_pool2d 3x3/2 forward+backward NHWC bfloat16": 1.6,
    "avg_pool2d 2x2 backward": 2.5,
    "batch_norm+add+relu training forward+backward NHWC": 1.6,
    "batch_norm training forward+backward NCHW float32": 1.6,
    "softmax forward+backward": 1.3,
    "cross_entropy forward+backward 2048x32768": 2.0,
    "Adam 160 tensors of 25 M against foreach": 2.5,
    "Adam 160 tensors of 25 M against fused": 1.0,
    "conv2d depthwise": 2.0,
    "product linear 4096x4096x4096 strict float32": 1.5,
    "MNIST CNN training step, batch 64, float32": 2.0,
    "ResNet-50 training step, batch 64, bfloat16 autocast NHWC, fused": 1.15,
}


def test_every_goal_has_a_row(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benches")
    from cuda_rows import ROWS

    for name, goal in GOALS.items():
        rows = [r for r in ROWS if r[0].startswith(name) and "CUDA graphs" not in r[0]]
        assert rows and all(r[1] == goal for r in rows), name
    assert all(r[2]["memory"] == 0.5 for r in ROWS if r[0].startswith("cross_entropy forward+backward 2048x32768"))
    others = [r for r in ROWS if not r[0].startswith(tuple(GOALS))]
    assert len(others) > 30 and all(goal >= 0.95 for _, goal, _, _ in others)


def test_tests_and_sanitizers(report, tmp_path):
    """Two shares of the tests together run all of them, once each; both sanitizers would run the marked ones."""
    select = "cuda_device and (clip_grad_norm or (test_optimizer and SGD))"
    options = ["--steps", "tests,sanitizers", "--processes", "2", "--select", select, "--own-select", "fused_layers"]
    code, output, content = report(*options)
    assert code == 0, output
    first, second, large, own = content["steps"]["tests"]
    assert first["passed"] + second["passed"] == 5 and first["passed"] > 0 < second["passed"]
    assert large["passed"] == 14 and large["job"].endswith("large tensors")
    assert own["passed"] == 8 and own["job"].endswith("own kernels")
    memcheck, racecheck = content["steps"]["sanitizers"]
    assert memcheck["job"].endswith("memcheck") and memcheck["passed"] > 20 and memcheck["exit"] == 0
    assert racecheck["job"].endswith("racecheck") and racecheck["exit"] == 0
    commands = [(tmp_path / "bin" / f"compute-sanitizer.{tool}").read_text() for tool in ("memcheck", "racecheck")]
    assert commands[0] == commands[1]


def test_every_test_of_a_device_is_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benches")
    from cuda_report import TESTS

    names = re.compile(r"\bimport .*\b(DEVICES|DEVICE)\b")
    using = {p.name for p in ROOT.glob("tests/test_*.py") if names.search(p.read_text())}
    assert using == {Path(p).name for p in TESTS}


@pytest.mark.parametrize("failure", ["absent", "fails"])
def test_what_goes_wrong_is_in_the_file(report, failure):
    sanitizer = {"absent": None, "fails": "#!/bin/sh\necho 'ERROR SUMMARY: 1 error'\nexit 9\n"}[failure]
    if failure == "absent" and any((Path(p) / "compute-sanitizer").exists() for p in os.get_exec_path()):
        sanitizer = "not a program"
    code, output, content = report("--steps", "sanitizers", sanitizer=sanitizer)
    assert code == 1 and "NOT OK: compute-sanitizer" in output
    assert all(job["exit"] != 0 for job in content["steps"]["sanitizers"])


def test_time_that_is_over(tmp_path):
    """As make runs it, in a process of its own."""
    options = arguments(tmp_path, "--steps", "sweep", "--only", "relu forward", seconds=-100)
    result = subprocess.run([sys.executable, ROOT / "benches" / "cuda_report.py", *options], capture_output=True)
    content = json.loads((tmp_path / "report.json").read_text())
    assert result.returncode == 1
    assert content["steps"]["sweep"]["exit"] == "out of time"
