"""The part of the zoo that `make test` has time for; `make zoo` runs all of it."""

import pytest
import torch

from zoo.check import examine
from zoo.models import ALL, LARGE

# Every other one of those that are not large: two minutes.
SOME = [e for e in ALL if e.name not in LARGE][::2]


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine small networks wait for their second thread longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", SOME, ids=str)
def test_converted_model_is_torchs(entry):
    examine(entry)
