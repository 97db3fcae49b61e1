"""What the sweeps share: their options, page faults, a training step, the table of the end, and result files."""

import argparse
import datetime
import json
import math
import resource
import time

import torch
from rich.console import Console
from rich.table import Table

import fastnn


def parser(doc, seconds, per, layout=False):
    """Options of every sweep: --threads, --seconds (`seconds` unless given) and --json; --layout where asked for."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seconds", type=float, default=seconds, help=f"per {per}")
    options.add_argument("--json", metavar="FILE", help="write the rows there too")
    if layout:
        options.add_argument("--layout", choices=["contiguous", "channels_last"], default="contiguous")
    return options


def setting(options):
    """What figures hold for, as titles say it."""
    return f"{options.threads} thread(s), {fastnn._C.isa()}, torch {torch.__version__}"


def fma_peak(seconds=0.3):
    """GFLOP/s of one thread on a product that stays in cache, the faster of both libraries: the machine's reach now."""
    a, b = torch.randn(336, 256), torch.randn(256, 512)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for mm in (fastnn.functional.mm, torch.mm):
            start = time.perf_counter()
            mm(a, b)
            best = min(best, time.perf_counter() - start)
    return 2 * 336 * 256 * 512 / best / 1e9


def page_faults(function, calls=5):
    """Minor page faults per call."""
    function()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def training_step(model, criterion, optimizer, x, y):
    """A function that makes one step and returns the loss."""

    def step():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def geomean(values):
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(measured):
    """Prints the geometric mean and the worst of each group in [(group, ratio, what was measured)]; returns them."""
    groups = {}
    for group, ratio, what in measured:
        groups.setdefault(group, []).append((ratio, what))
    table = Table("group", "cases", "geomean", "worst", "at")
    figures = {}
    for group, ratios in groups.items():
        mean, (worst, what) = geomean(r for r, _ in ratios), min(ratios)
        figures[group] = {"geomean": round(mean, 2), "worst": round(worst, 2)}
        table.add_row(group, str(len(ratios)), f"x{mean:.2f}", f"x{worst:.2f}", what)
    Console(width=140).print(table)
    return figures


def write_rows(path, rows, **about):
    """Writes `rows` (dicts) to `path`, if any, as JSON, after the versions, the CPU path, the date and `about`."""
    if not path:
        return
    versions = {"torch": torch.__version__, "fastnn": fastnn.__version__, "isa": fastnn._C.isa()}
    head = versions | {"date": str(datetime.date.today())} | about
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    fields = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    with open(path, "w") as file:
        file.write("{\n" + fields + ' "rows": [\n  ' + lines + "\n ]\n}\n")
