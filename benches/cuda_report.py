"""Everything that wants a CUDA device, within a given time, into one results file: `make report-cuda`.

    python benches/cuda_report.py --out out/cuda.json --until $(($(date +%s) + 540))

Steps: the tests on the device, in several processes; compute-sanitizer's memcheck and racecheck on a few of them; the
sweep of run_cuda.py with the choices that are built in; and the products and convolutions again inside
fastnn.autotune(), whose times of both sides are what the choice table is filled from. The file is complete after every
step, and names device, driver, versions, date and commit. `--device cpu` is a dry run.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import run_cuda
from cuda_rows import Settings

ROOT = Path(__file__).parents[1]
TESTS = ["tests/test_cuda_device.py", "tests/test_forward.py", "tests/test_gradcheck.py"]  # those that name a device
SANITIZED = "sanitize"  # the marker of the tests that compute-sanitizer runs


def pytest(*arguments):
    # Importing hypothesis, which these tests do not use, would take a quarter of a process's start.
    plugins = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return [sys.executable, "-m", "pytest", *plugins, "--color=no", "-rf", *arguments]


class Job:
    """A process and its output, ended when its time is over."""

    def __init__(self, name, command, until, **env):
        self.name, self.until, self.begin = name, until, time.time()
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=self.output, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )

    def result(self):
        try:
            code = self.process.wait(max(1.0, self.until - time.time()))
        except subprocess.TimeoutExpired:
            code = "out of time"
            self.process.send_signal(signal.SIGINT)  # pytest then says what has passed
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.output.seek(0)
        text = self.output.read()
        print(f"-- {self.name}: {code}\n{text[-3000:]}", flush=True)
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?)\b", text)}
        failed = re.findall(r"^(?:FAILED|ERROR) (.*)", text, re.M)
        return {"job": self.name, "exit": code, "seconds": time.time() - self.begin, **counts, "failures": failed[:50],
                "tail": [] if code == 0 else text[-3000:].splitlines()}  # fmt: skip


def tests(options, until):
    """Every test of the device in `processes` shares at once, and products and convolutions on fastnn's own kernels."""
    files = TESTS if options.device == "cuda" else TESTS[:1]
    n, all_tests = options.processes, pytest(*files, "-m", "not large", "-k", options.select)
    jobs = [Job(f"tests {i + 1}/{n}", all_tests, until, FASTNN_SHARD=f"{i}/{n}") for i in range(n)]
    own = pytest(*files, "-m", "not large", "-k", options.own_select)
    jobs.append(Job("tests of large tensors", pytest(TESTS[0], "-m", "large"), until))  # one after the other
    return [*jobs, Job("tests on fastnn's own kernels", own, until, FASTNN_CUDA_KERNELS="own")]


def sanitizers(options, until):
    return [
        Job(f"compute-sanitizer {tool}",
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9,
             *pytest(TESTS[0], "-m", SANITIZED)],
            until, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        for tool in ("memcheck", "racecheck")
    ]  # fmt: skip


def sweep(options, until, *more):
    """The rows of run_cuda.py, alone on the device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.json"
        command = [sys.executable, "benches/run_cuda.py", "--out", path, "--device", options.device, *more]
        job = Job("sweep " + " ".join(more), [*command, "--until", until - 15], until)
        return {**job.result(), **(json.loads(path.read_text()) if path.exists() else {})}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--until", type=float, required=True, help="be done by this time (date +%%s)")
    parser.add_argument("--steps", default="tests,sanitizers,sweep,choices", help="which, with commas between")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run")
    parser.add_argument(
        "--processes", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)), help="of the tests"
    )
    parser.add_argument("--select", default="cuda", help="the tests, as pytest's -k has it")
    products = "cuda and (conv2d or linear or mm or matmul) and not no_synchronisation"
    parser.add_argument("--own-select", default=products, help="those for which fastnn's kernels take every call")
    parser.add_argument("--only", default="", help="rows of the sweep whose name contains this text")
    options = parser.parse_args(argv)
    steps, begin = options.steps.split(","), time.time()
    Settings.device = options.device
    report = {**run_cuda.facts(), "steps": {}}

    def keep(step, result):
        report["steps"][step] = result
        run_cuda.write(options.out, report)

    # Tests take at most half of the time; figures come after them, when nothing else is on the device.
    half = begin + (options.until - begin) / (2 if {"sweep", "choices"} & set(steps) else 1)
    jobs = {}
    if "tests" in steps:
        jobs["tests"] = tests(options, half)
    if "sanitizers" in steps:
        try:
            jobs["sanitizers"] = sanitizers(options, half)
        except OSError as error:
            keep("sanitizers", [{"job": "compute-sanitizer", "exit": str(error)}])
    for step, running in jobs.items():
        keep(step, [job.result() for job in running])
    if "sweep" in steps:
        now, share = time.time(), 0.7 if "choices" in steps else 1
        keep("sweep", sweep(options, now + share * (options.until - now), "--only", options.only))
    if "choices" in steps:
        keep("choices", sweep(options, options.until, "--autotune", "--only", options.only or "product"))

    results = [r for step in report["steps"].values() for r in (step if isinstance(step, list) else [step])]
    wrong = [r["job"] for r in results if r["exit"] != 0]
    rows = [row for r in results for row in r.get("rows", [])]
    met, passed = sum(row.get("met", False) for row in rows), sum(r.get("passed", 0) for r in results)
    seconds = time.time() - begin
    print(f"-- {passed} tests passed; {met} of {len(rows)} rows met their goal; {seconds:.0f} s; {options.out}")
    print(*(f"-- NOT OK: {name}" for name in wrong), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
