"""Random erasing (Zhong et al. 2020) in timm's mode "pixel": a rectangle becomes normal noise."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from workloads.data.keys import mix, uniform

TRIES = 10  # a rectangle that does not fit is drawn again


class Erasing(BaseModel):
    """What is erased; by default as in fine-tuning of MAE (code: reprob 0.25, mode pixel, count 1) and in timm.

    Attributes:
        p: probability that a rectangle of a sample is erased.
        area: its share of the image, drawn uniformly.
        ratio: its height / width, drawn uniformly in the logarithm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    p: float = Field(default=0.25, ge=0, le=1)
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    @model_validator(mode="after")
    def _in_range(self) -> Erasing:
        if not 0 <= self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"got area={self.area}, expected 0 <= low <= high <= 1, shares of the image")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"got ratio={self.ratio}, expected 0 < low <= high; it is height / width")
        return self


def apply(erasing: Erasing, images: Tensor, keys: Tensor, salt: str) -> Tensor:
    """Replaces a rectangle of some images by noise of mean 0 and deviation 1.

    Only erased pixels cost anything, and what they become depends on the key of the sample and their place. On a GPU
    their number is waited for once.

    Args:
        erasing: what is drawn.
        images: float [B, C, H, W], normalised, on any device; they are not changed in place.
        keys: int64 [B], the randomness of each sample.
        salt: makes two views of one sample independent. The geometry of a view may share it.

    Returns:
        [B, C, H, W] of the same type.
    """
    assert images.is_floating_point(), f"random erasing comes after normalisation: got {images.dtype}"
    keys = keys.cpu()
    C, H, W = images.shape[1:]
    top, left, h, w = draw(erasing, keys, (H, W), salt).to(images.device)[:, :, None, None].unbind(1)
    y = torch.arange(H, device=images.device)[None, :, None]
    x = torch.arange(W, device=images.device)[None, None, :]
    sample, row, column = ((top <= y) & (y < top + h) & (left <= x) & (x < left + w)).nonzero().unbind(1)
    pixel_keys = keys.to(images.device)[sample] ^ mix(row * W + column)
    u = uniform(pixel_keys, C, f"{salt}/erasing/noise").clamp(min=2.0**-54)  # 0 is infinitely far from the mean
    noise = torch.special.ndtri(u)
    images = images.clone()
    images[sample, :, row, column] = noise.to(images.dtype)
    return images


def draw(erasing: Erasing, keys: Tensor, size: tuple[int, int], salt: str) -> Tensor:
    """Draws the rectangles: int64 [B, 4], top, left, height and width in pixels; all zero where nothing is erased.

    Args:
        erasing: what is drawn.
        keys: int64 [B].
        size: height and width of the images in pixels.
        salt: see `apply`.
    """
    u = uniform(keys, 3 + 2 * TRIES, f"{salt}/erasing")
    H, W = size
    low, high = erasing.area
    area = H * W * (low + (high - low) * u[:, 3 : 3 + TRIES])
    log_low, log_high = (math.log(ratio) for ratio in erasing.ratio)
    ratio = torch.exp(log_low + (log_high - log_low) * u[:, 3 + TRIES :])
    h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # [B, TRIES]
    fits = (h < H) & (w < W)
    first = fits.int().argmax(dim=1, keepdim=True)
    extent = torch.cat([h.gather(1, first), w.gather(1, first)], dim=1)  # [B, 2]
    corner = (u[:, 1:3] * (torch.tensor(size, device=keys.device) - extent + 1)).floor()
    erased = fits.any(dim=1) & (u[:, 0] < erasing.p)
    return torch.where(erased[:, None], torch.cat([corner, extent], dim=1), 0).long()
