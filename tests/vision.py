"""torchvision and timm beside a CPU build of torch.

PyPI's torchvision is built for CUDA: its compiled operators do not load there, and its import stops when it describes
two of them. They are declared here, without kernels, before the second attempt; classification models need none.
"""

import sys

import torch

_DECLARED = torch.library.Library("torchvision", "FRAGMENT")
_DETECTION_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _import_torchvision():
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for op in _DETECTION_OPS:
            _DECLARED.define(op)
        import torchvision
    return torchvision


torchvision = _import_torchvision()

import timm  # noqa: E402
import timm.layers  # noqa: E402
import torchvision.models  # noqa: E402, F811
from torchvision.models import feature_extraction  # noqa: E402

__all__ = ["feature_extraction", "timm", "torchvision"]
