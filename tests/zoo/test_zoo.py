"""The part of the zoo that `make test` has time for; `make zoo` runs all of it."""

import pytest

from zoo.check import examine
from zoo.models import ALL, LARGE

# Every other one of those that are not large: two minutes.
SOME = [e for e in ALL if e.name not in LARGE][::2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", SOME, ids=str)
def test_converted_model_is_torchs(entry):
    examine(entry)
