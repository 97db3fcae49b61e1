"""Interleaved A/B timing: the ratio of two functions measured in one process, robust to a drifting machine."""

import statistics
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Times in seconds per call; ratio = reference / ours, so above 1 means ours is faster."""

    ours: float
    reference: float
    ratio: float
    p20: float
    p80: float

    def __str__(self):
        return (
            f"{self.ours * 1e6:10.1f} us  torch {self.reference * 1e6:10.1f} us  "
            f"x{self.ratio:.2f} (p20 {self.p20:.2f}, p80 {self.p80:.2f})"
        )


def _time(function, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def compare(ours, reference, *, min_pairs=20, seconds=0.5, max_pairs=200):
    """Times two callables A B B A interleaved and returns the median of the pairwise ratios.

    Args:
        ours, reference: callables without arguments that do the same work. Check their results before timing.
        min_pairs: pairs to measure at least.
        seconds: keep measuring until this much time is spent (and min_pairs is reached).
        max_pairs: stop after this many pairs.
    """
    ours(), reference()  # warm up: page in, create threads
    once = max(_time(ours, 1), _time(reference, 1), 1e-7)
    repeats = max(1, int(2e-4 / once))  # a sample lasts at least 0.2 ms
    a, b = [], []
    deadline = time.perf_counter() + seconds
    while len(a) < max_pairs and (len(a) < min_pairs or time.perf_counter() < deadline):
        if len(a) % 2 == 0:
            a.append(_time(ours, repeats))
            b.append(_time(reference, repeats))
        else:
            b.append(_time(reference, repeats))
            a.append(_time(ours, repeats))
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    pick = lambda q: ratios[min(len(ratios) - 1, int(q * len(ratios)))]  # noqa: E731
    return Ratio(statistics.median(a), statistics.median(b), statistics.median(ratios), pick(0.2), pick(0.8))
