"""Adagrad."""

import torch

from fastnn import _C
from fastnn.optim import _step


class Adagrad(torch.optim.Adagrad):
    """torch.optim.Adagrad with all parameters stepped by one C++ call.

    Same arguments, state_dict and results; dtypes and fallbacks as fastnn.optim.Adam.
    Source: torch.optim.Adagrad; Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning".
    """

    @_step.hooked
    def step(self, closure=None):
        return _step.run(self, closure, torch.optim.Adagrad, 4, _C.adagrad_step)
