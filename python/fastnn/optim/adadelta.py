"""Adadelta."""

import torch

from fastnn import _C
from fastnn.optim import _step


class Adadelta(torch.optim.Adadelta):
    """torch.optim.Adadelta with all parameters stepped by one C++ call.

    Same arguments, state_dict and results; dtypes and fallbacks as fastnn.optim.Adam.
    Source: torch.optim.Adadelta; Zeiler, "ADADELTA: An Adaptive Learning Rate Method".
    """

    @_step.hooked
    def step(self, closure=None):
        return _step.run(self, closure, torch.optim.Adadelta, 5, _C.adadelta_step)
