"""What torch refuses, fastnn refuses with the same exception type and the same text."""

import pytest
import torch
from cases import BAD

import fastnn


@pytest.mark.parametrize("i", range(len(BAD)), ids=lambda i: f"{BAD[i][0]}-{i}")
def test_same_error(i):
    op, build = BAD[i]
    reference = getattr(torch.nn.functional, op, None) or getattr(torch, op)
    with pytest.raises(Exception) as theirs:
        reference(*build())
    with pytest.raises(theirs.type) as ours:
        getattr(fastnn.functional, op)(*build())
    assert str(ours.value) == str(theirs.value)
