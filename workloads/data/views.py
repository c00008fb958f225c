"""What a method looks at, as data: geometry, executed at decode, and colour, changed by batch on the device.

A `View` holds no code, so a spec can override it, the reader can execute it a batch at
a time, and the geometry that it drew for each sample can travel with the batch. Bytes travel to the device; there
`finish` changes their colours and normalises them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from workloads.data.transforms.erasing import Erasing
from workloads.data.transforms.photometry import IMAGENET_MEAN, IMAGENET_STD, Photometry
from workloads.data.transforms.randaugment import RandAugment

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "View"]


class View(BaseModel):
    """One square view of an image.

    Attributes:
        member: what it looks at.
        size: side of the result in pixels.
        crop_scale: share of the image's area that the crop covers, drawn uniformly; (1, 1) keeps the whole image
            (of one that is not square the centre: the short side is resized to `size`, the middle is cut out).
        crop_ratio: width / height of the crop, drawn uniformly in the logarithm; irrelevant when the scale is (1, 1).
        flip: probability of a horizontal flip.
        rotate_deg: rotation about the centre, drawn uniformly from [-rotate_deg, rotate_deg].
        interpolation: of the resize; both are antialiased.
        randaugment: drawn changes of shape and colour, first.
        photometry: changes of colour, then.
        mean, std: normalisation by channel of pixels in [0, 1].
        erasing: rectangles of noise in the normalised image, last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "image"
    size: int = Field(ge=1)
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.0, ge=0, le=1)
    rotate_deg: float = Field(default=0.0, ge=0, le=180)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    randaugment: RandAugment | None = None
    photometry: Photometry | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    erasing: Erasing | None = None

    @property
    def draws(self) -> bool:
        """Whether anything about it is random."""
        return self.crops or self.flip > 0 or self.rotate_deg > 0

    @property
    def crops(self) -> bool:
        return min(self.crop_scale) < 1

    @model_validator(mode="after")
    def _in_range(self) -> View:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"got crop_scale={self.crop_scale}, expected 0 < low <= high <= 1, shares of the area")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"got crop_ratio={self.crop_ratio}, expected 0 < low <= high; it is width / height")
        if min(self.std) <= 0:
            raise ValueError(f"got std={self.std}, expected positive numbers; (1, 1, 1) leaves pixels in [0, 1]")
        return self
