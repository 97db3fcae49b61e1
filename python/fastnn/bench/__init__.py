"""Measuring fastnn against torch: interleaved timing, and the table of `python -m fastnn bench`."""

from fastnn.bench.ab import Ratio, compare

__all__ = ["Ratio", "compare"]
