"""Fixtures shared by all tests."""

import pytest
import torch

import fastnn


@pytest.fixture(autouse=True)
def _steady():
    """Every test starts from the same seed, the default ISA and no recorded fallbacks."""
    torch.manual_seed(0)
    isa = fastnn._C.isa()
    fastnn.fallbacks(clear=True)
    yield
    fastnn._C.set_isa(isa)
