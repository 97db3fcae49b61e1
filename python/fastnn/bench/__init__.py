"""Measuring fastnn against torch: interleaved timing and sweeps."""

from fastnn.bench.ab import Ratio, compare

__all__ = ["Ratio", "compare"]
