"""What a method looks at, as data: the geometry of one view, executed at decode.

A `View` holds no code, so a spec can override it, the reader can execute it a batch at
a time, and the box that it drew for each sample can travel with the batch.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class View(BaseModel):
    """One square view of an image.

    Attributes:
        size: side of the result in pixels.
        crop_scale: share of the image's area that the crop covers, drawn uniformly; (1, 1) keeps the whole image.
        crop_ratio: width / height of the crop, drawn uniformly in the logarithm; irrelevant when the scale is (1, 1).
        flip: probability of a horizontal flip.
        rotate_deg: rotation about the centre, drawn uniformly from [-rotate_deg, rotate_deg].
        mean, std: normalisation by channel of pixels in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1)
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.0, ge=0, le=1)
    rotate_deg: float = Field(default=0.0, ge=0, le=180)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
