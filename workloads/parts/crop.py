"""The view that most methods share: a random part of the image, enlarged, perhaps mirrored."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


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
