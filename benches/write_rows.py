"""Result files of the sweeps: what ran and where, then one measured row per line."""

import datetime
import json

import torch

import fastnn


def write_rows(path, rows, **about):
    """Writes `rows` (dicts) to `path` as JSON, after the versions, the CPU path, the date and `about`."""
    versions = {"torch": torch.__version__, "fastnn": fastnn.__version__, "isa": fastnn._C.isa()}
    head = versions | {"date": str(datetime.date.today())} | about
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    fields = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    with open(path, "w") as file:
        file.write("{\n" + fields + ' "rows": [\n  ' + lines + "\n ]\n}\n")
