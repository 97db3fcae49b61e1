"""cross_entropy and nll_loss."""

import torch.nn.functional as F

from fastnn.functional._call import aten, has_torch_function, op, overridden

_cross_entropy = op("cross_entropy", traced_result=0)
_nll_loss = op("nll_loss", traced_result=0)

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """-log softmax(input) at the target class, or averaged over the target's class probabilities.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16.
        target: class indices () , (N) or (N, d1, ...), int64 (uint8 for (N)); or class probabilities of the input's
            shape and dtype.
        weight: (C) of the input's dtype, a factor per class.
        size_average, reduce: deprecated; override `reduction`.
        ignore_index: class index that counts for nothing.
        reduction: "none", "mean" (over the weights of the counted targets; over rows for probabilities) or "sum".
        label_smoothing: in [0, 1], the share of the target spread evenly over all classes.

    Returns:
        A scalar, or (N, d1, ...) with reduction "none", of the input's dtype.

    Raises what torch.nn.functional.cross_entropy raises, IndexError for a class out of range among it. Where a gradient
    will be needed of a reduced loss in float32 or float64 (class indices, no smoothing, CPU), one pass computes both
    and the graph keeps the gradient; elsewhere backward reads the logits again instead of keeping softmax. Changing
    them in place in between is an error.
    Source: torch.nn.functional.cross_entropy; label smoothing: Szegedy et al., "Rethinking the Inception Architecture
    for Computer Vision".
    """
    if has_torch_function((input, target, weight)):
        return overridden(
            cross_entropy, F.cross_entropy, (input, target, weight),
            input, target, weight=weight, size_average=size_average, ignore_index=ignore_index, reduce=reduce,
            reduction=reduction, label_smoothing=label_smoothing,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = F._Reduction.legacy_get_string(size_average, reduce)
    try:
        return _cross_entropy(input, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing)
    except (TypeError, KeyError):
        return aten(
            F.cross_entropy, input, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing,
        )  # fmt: skip


def nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
    """-input at the target class.

    Args:
        input: log-probabilities (C), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16.
        target: class indices (), (N) or (N, d1, ...), int64 (uint8 for (N)).
        weight, size_average, ignore_index, reduce, reduction: as cross_entropy's.

    Returns and errors as cross_entropy's. Source: torch.nn.functional.nll_loss.
    """
    if has_torch_function((input, target, weight)):
        return overridden(
            nll_loss, F.nll_loss, (input, target, weight),
            input, target, weight=weight, size_average=size_average, ignore_index=ignore_index, reduce=reduce,
            reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = F._Reduction.legacy_get_string(size_average, reduce)
    try:
        return _nll_loss(input, target, weight, _REDUCTIONS[reduction], ignore_index)
    except (TypeError, KeyError):
        return aten(F.nll_loss, input, target, weight, ignore_index=ignore_index, reduction=reduction)
