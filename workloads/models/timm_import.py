"""timm, imported once, also where torchvision's compiled operators do not load.

`pip` can pair a CPU build of torch with a CUDA build of torchvision; importing
torchvision, and so timm, then fails with "operator torchvision::nms does not exist".
Only in that case the two missing operator schemas are defined here and the import is
tried again; with matching builds nothing is touched.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_library: torch.library.Library | None = None  # the definitions live as long as this object


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: boxes [N, 4] (x0, y0, x1, y1), scores [N] -> kept indices, best first."""
    area = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while left.numel():
        best, left = left[0], left[1:]
        kept.append(best)
        low = torch.maximum(dets[best, :2], dets[left, :2])
        high = torch.minimum(dets[best, 2:], dets[left, 2:])
        inter = (high - low).clamp(min=0).prod(dim=1)
        left = left[inter / (area[best] + area[left] - inter) <= iou_threshold]
    return torch.stack(kept) if kept else left


def _define_missing_operators() -> None:
    global _library
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", _nms, "CPU")


def _import() -> Any:
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _define_missing_operators()
    import timm

    return timm


timm = _import()
