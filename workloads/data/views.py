"""What a method looks at, as data: geometry, executed at decode, and colour, changed by batch on the device.

A `View` holds no code, so a spec can override it, the reader can execute it a batch at
a time, and the geometry that it drew for each sample can travel with the batch. Bytes travel to the device; there
`finish` changes their colours and normalises them.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from workloads.data.transforms.erasing import Erasing
from workloads.data.transforms.photometry import IMAGENET_MEAN, IMAGENET_STD, Photometry
from workloads.data.transforms.randaugment import RandAugment

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Size", "View", "height_width"]

Side: TypeAlias = Annotated[int, Field(ge=1)]
Size: TypeAlias = Annotated[
    Side | tuple[Side, Side],
    AfterValidator(lambda size: size[0] if isinstance(size, tuple) and size[0] == size[1] else size),
]
"""Of an image, in pixels: the side of a square, or (height, width)."""


def height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class View(BaseModel):
    """One view of an image.

    Attributes:
        member: what it looks at.
        size: of the result in pixels.
        crop_scale: share of the image's area that the crop covers, drawn uniformly; (1, 1) keeps the whole image
            (of one of another shape the centre: the largest part of the shape of `size`, resized).
        crop_ratio: width / height of the crop, drawn uniformly in the logarithm; irrelevant when the scale is (1, 1).
        flip: probability of a horizontal flip.
        rotate_deg: rotation about the centre, drawn uniformly from [-rotate_deg, rotate_deg]; of squares only.
        interpolation: of the resize; both are antialiased.
        randaugment: drawn changes of shape and colour, first.
        photometry: changes of colour, then.
        mean, std: normalisation by channel of pixels in [0, 1].
        erasing: rectangles of noise in the normalised image, last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "image"
    size: Size
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
        if self.rotate_deg and not isinstance(self.size, int):
            raise ValueError(f"got rotate_deg={self.rotate_deg} for size={self.size}, expected a square that turns")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"got crop_ratio={self.crop_ratio}, expected 0 < low <= high; it is width / height")
        if min(self.std) <= 0:
            raise ValueError(f"got std={self.std}, expected positive numbers; (1, 1, 1) leaves pixels in [0, 1]")
        return self
