"""SGD with momentum."""

import torch

from fastnn import _C
from fastnn.optim import _step


class SGD(torch.optim.SGD):
    """torch.optim.SGD with all parameters stepped by one C++ call.

    Same arguments, state_dict and results; dtypes and fallbacks as fastnn.optim.Adam. Source: torch.optim.SGD.
    """

    @_step.hooked
    def step(self, closure=None):
        return _step.run(self, closure, torch.optim.SGD, 3, _C.sgd_step)
