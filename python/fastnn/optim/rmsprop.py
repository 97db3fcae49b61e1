"""RMSprop."""

import torch

from fastnn import _C
from fastnn.optim import _step


class RMSprop(torch.optim.RMSprop):
    """torch.optim.RMSprop with all parameters stepped by one C++ call.

    Same arguments, state_dict and results; dtypes and fallbacks as fastnn.optim.Adam.
    Source: torch.optim.RMSprop; Hinton's lecture notes on neural networks.
    """

    @_step.hooked
    def step(self, closure=None):
        return _step.run(self, closure, torch.optim.RMSprop, 6, _C.rmsprop_step)
