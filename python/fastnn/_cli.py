"""What the commands of `python -m fastnn` share: one-line errors, option types, output files checked before work."""

import argparse
import json
import math
import os
import sys

import torch


class Problem(Exception):
    """A mistake of the caller's that one line explains; the command prints it and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, without the usage."""

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def _number(text, kind, fits, what):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def positive_int(text):
    """An option's value as a whole number of at least 1."""
    return _number(text, int, lambda value: 1 <= value < 2**31, "a whole number from 1 up")


def positive_float(text):
    """An option's value as a number above 0, small enough for float32 arithmetic on it."""
    return _number(text, float, lambda value: 0 < value <= 1e30, "a number above 0 and up to 1e30")


def seed(text):
    """An option's value as a seed that torch's and numpy's generators take: a whole number below 2**63."""
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 up")


def set_threads(count):
    """Sets torch's CPU threads; raises Problem for more than the machine has CPUs."""
    if count > (os.cpu_count() or 1):
        raise Problem(f"--threads: {count} threads, and this machine has {os.cpu_count()} CPUs")
    torch.set_num_threads(count)


def check_writable(option, path):
    """Raises Problem when `path` cannot be written, before any work is spent; leaves no new file behind."""
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except (OSError, ValueError) as error:
        raise Problem(f"{option}: cannot write {path!r}: {reason(error)}") from None
    if not existed:
        os.unlink(path)


def write_json(path, value):
    """Writes `value` as JSON; a number that is not finite becomes null."""

    def finite(v):
        if isinstance(v, dict):
            return {k: finite(x) for k, x in v.items()}
        if isinstance(v, list):
            return [finite(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(finite(value), file, indent=1, allow_nan=False)
            file.write("\n")
    except OSError as error:
        raise Problem(f"--json: cannot write {path!r}: {reason(error)}") from None


def reason(error):
    """An exception's text on one line, without Python's decoration."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
