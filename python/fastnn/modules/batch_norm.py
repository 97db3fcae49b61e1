"""BatchNorm1d and BatchNorm2d, and BatchNorm2d with a ReLU or a residual and a ReLU behind it."""

import torch
import torch.fx

from fastnn import functional as F
from fastnn.modules._tensors import buffer, parameter
from fastnn.modules._trace import recorded


def _apply(module, function, *tensors):
    """torch's bookkeeping of the running statistics around one call of `function`."""
    if isinstance(tensors[0], torch.fx.Proxy):  # torch.fx takes torch.nn's layers whole
        return recorded(module, *tensors)
    module._check_input_dim(tensors[0])
    momentum = 0.0 if module.momentum is None else module.momentum
    tracks = module.training and module.track_running_stats
    if tracks and (batches := buffer(module, "num_batches_tracked")) is not None:
        batches.add_(1)
        if module.momentum is None:  # the average over all batches so far
            momentum = 1.0 / float(batches)
    mean, var = buffer(module, "running_mean"), buffer(module, "running_var")
    use_buffers = tracks or not module.training
    return function(
        *tensors,
        mean if use_buffers else None,
        var if use_buffers else None,
        parameter(module, "weight"),
        parameter(module, "bias"),
        module.training or (mean is None and var is None),
        momentum,
        module.eps,
    )


class BatchNorm1d(torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on fastnn's kernels: [N, C] or [N, C, L] in, the same shape out."""

    def forward(self, input):
        return _apply(self, F.batch_norm, input)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fastnn's kernels: [N, C, H, W] in, the same shape and memory format out."""

    def forward(self, input):
        return _apply(self, F.batch_norm, input)


class BatchNormReLU2d(torch.nn.BatchNorm2d):
    """BatchNorm2d and a ReLU in one: [N, C, H, W] in, the same shape and memory format out."""

    def forward(self, input):
        return _apply(self, F.batch_norm_relu, input)


class BatchNormAddReLU2d(torch.nn.BatchNorm2d):
    """The end of a residual block: relu(batch_norm(input) + residual), both [N, C, H, W]."""

    def forward(self, input, residual):
        return _apply(self, F.batch_norm_add_relu, input, residual)
