"""The view that most methods share: a random part of the image, enlarged, perhaps mirrored; and MoCo's colours."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from workloads.data.transforms.photometry import Photometry

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter_p": 0.8, "gray_p": 0.2}
"""Of MoCo v2, without its blur."""


class RandomResizedCrop(BaseModel):
    """Fields of `data.views.View` for the `view` of a method, which says its own defaults by a subclass.

    The defaults here are those of supervised training on ImageNet (Szegedy et al. 2015).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotate_deg: float = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class MoCoCrop(RandomResizedCrop):
    """That of MoCo v2 (Chen et al. 2020, arXiv 2003.04297, section 3, and its code), which many took over."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    photometry: Photometry = Photometry(**JITTER, blur_p=0.5)
