"""Fixtures shared by all tests."""

import os

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


def pytest_collection_modifyitems(config, items):
    """FASTNN_SHARD=1/4 keeps the second of four shares of the tests, for processes side by side."""
    share, count = map(int, os.environ.get("FASTNN_SHARD", "0/1").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != share])
    items[:] = items[share::count]
