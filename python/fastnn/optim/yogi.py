"""Yogi: Adam whose second moment moves by a bounded share of the squared gradient."""

import torch

from fastnn import _C
from fastnn.optim import _step


class Yogi(torch.optim.Optimizer):
    """Adam's step with the second moment s -= (1 - beta2) sign(s - g^2) g^2, which cannot forget in one large step.

    Args:
        params: parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a number or a tensor of one element.
        betas: decay of the first moment, share of the squared gradient in the second moment.
        eps: added to the denominator after the square root.
        weight_decay: L2 penalty, added to the gradient.
        maximize: step along the gradient instead of against it.

    State per parameter: step, exp_avg, exp_avg_sq, all starting at zero, with Adam's bias corrections. Dtypes as
    fastnn.optim.Adam; other tensors take a step written with torch's operators, counted in fastnn.fallbacks().
    Raises ValueError for options out of range and RuntimeError for sparse gradients.
    Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization".
    """

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=0, *, maximize=False):
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**options, "differentiable": False})

    def _init_group(self, group):
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Yogi does not support sparse gradients")
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    @_step.hooked
    def step(self, closure=None):
        return _step.run(self, closure, Yogi, 0, _C.yogi_step, _operators)


@torch.no_grad()
def _operators(optimizer):
    """The same step by torch's operators, for the tensors the kernels do not take."""
    for group in optimizer.param_groups:
        optimizer._init_group(group)
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimizer.state[p]
            state["step"] += 1
            step = state["step"].item()
            g, m, s, w = p.grad, state["exp_avg"], state["exp_avg_sq"], p
            if torch.is_complex(p):
                g, m, s, w = (torch.view_as_real(t) for t in (g, m, s, w))
            g = -g if group["maximize"] else g
            g = g.add(w, alpha=group["weight_decay"])
            m.lerp_(g, 1 - beta1)
            s.addcmul_(torch.sign(s - g * g), g * g, value=-(1 - beta2))
            denominator = (s / (1 - beta2**step)).sqrt_().add_(group["eps"])
            w.addcdiv_(m, denominator, value=-float(group["lr"]) / (1 - beta1**step))
