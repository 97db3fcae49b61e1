"""Fixtures shared by all tests."""
# ruff: noqa: E402

import os

# Threads that spin while they wait take the cores from the tests beside them. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import fastnn


@pytest.fixture(autouse=True)
def _steady():
    """Every test starts from the same seed, the default ISA and number of threads, and no recorded fallbacks."""
    torch.manual_seed(0)
    isa, threads = fastnn._C.isa(), torch.get_num_threads()
    fastnn.fallbacks(clear=True)
    yield
    fastnn._C.set_isa(isa)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def forced():
    """A function that forces a convolution algorithm by name until the test ends."""
    yield fastnn._C.conv2d_force
    fastnn._C.conv2d_force("")


@pytest.fixture
def one_thread():
    """On a busy machine small networks wait for their second thread longer than they compute."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """FASTNN_SHARD=1/4 keeps the second of four shares of the tests, for processes side by side."""
    share, count = map(int, os.environ.get("FASTNN_SHARD", "0/1").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != share])
    items[:] = items[share::count]
