"""Adam and AdamW."""

import torch

from fastnn import _C
from fastnn.optim import _step


class Adam(torch.optim.Adam):
    """torch.optim.Adam with all parameters stepped by one C++ call.

    Same arguments, state_dict and results; float32, float64, bfloat16 and float16 parameters on the CPU or a CUDA
    device, whose updates are computed in float32 (float64 for float64) and rounded once. Everything else (capturable,
    differentiable, other devices, tensor betas, ...) takes torch's own step, counted in fastnn.fallbacks().
    Source: torch.optim.Adam; Kingma and Ba, "Adam: A Method for Stochastic Optimization".
    """

    @_step.hooked
    def step(self, closure=None):
        return _step.run(self, closure, torch.optim.Adam, 6, _C.adam_step)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with all parameters stepped by one C++ call; see Adam.

    Source: torch.optim.AdamW; Loshchilov and Hutter, "Decoupled Weight Decay Regularization".
    """

    @_step.hooked
    def step(self, closure=None):
        return _step.run(self, closure, torch.optim.AdamW, 6, _C.adam_step)
