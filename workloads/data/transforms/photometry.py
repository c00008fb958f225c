"""Colour of a view, jittered by batch on the device where the images are.

What is drawn for a sample depends on its key alone. All arithmetic is in float: between two operations nothing is
rounded to bytes, as it is on Pillow's path through torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from workloads.data.keys import uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue in grey: ITU-R BT.601, to torchvision's digits


class Photometry(BaseModel):
    """Random changes of colour, in the order in which they are applied; by default there are none.

    Attributes:
        brightness, contrast, saturation: strength b of the jitter; the factor is uniform in [max(0, 1 - b), 1 + b].
        hue: strength of the jitter; the shift is uniform in [-hue, hue], in turns of the colour circle.
        jitter_p: probability of the jitter, whose four changes come in a random order as in torchvision's ColorJitter.
        gray_p: probability of greyscale.
        blur_p: probability of a Gaussian blur.
        blur_sigma: its standard deviation in pixels, drawn uniformly from [low, high].
        blur_kernel: odd width of its kernel in pixels; None takes 10 % of the side (SimCLR, appendix A).
        solarize_p: probability that values from `solarize_threshold` on are inverted.
        solarize_threshold: in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    brightness: float = Field(default=0.0, ge=0)
    contrast: float = Field(default=0.0, ge=0)
    saturation: float = Field(default=0.0, ge=0)
    hue: float = Field(default=0.0, ge=0, le=0.5)
    jitter_p: float = Field(default=1.0, ge=0, le=1)
    gray_p: float = Field(default=0.0, ge=0, le=1)
    blur_p: float = Field(default=0.0, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = Field(default=None, ge=1)
    solarize_p: float = Field(default=0.0, ge=0, le=1)
    solarize_threshold: float = Field(default=0.5, ge=0, le=1)

    @property
    def jitter(self) -> tuple[float, float, float, float]:
        """Strengths of brightness, contrast, saturation and hue."""
        return self.brightness, self.contrast, self.saturation, self.hue

    @model_validator(mode="after")
    def _can_blur(self) -> Photometry:
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"got blur_sigma={self.blur_sigma}, expected 0 < low <= high, in pixels")
        if self.blur_kernel is not None and self.blur_kernel % 2 == 0:
            raise ValueError(f"got blur_kernel={self.blur_kernel}, expected an odd width: {self.blur_kernel + 1}?")
        return self


@dataclass(frozen=True)
class Draws:
    """What was drawn for each sample.

    Attributes:
        jitter, gray, blur, solarize: bool [B], whether it is applied.
        factors: float64 [B, 4], brightness, contrast, saturation, and the shift of hue.
        order: int64 [B, 4], which of these four comes first, second, third, fourth.
        sigma: float64 [B], of the blur, in pixels.
    """

    jitter: Tensor
    gray: Tensor
    blur: Tensor
    solarize: Tensor
    factors: Tensor
    order: Tensor
    sigma: Tensor


def apply(photometry: Photometry, images: Tensor, keys: Tensor, salt: str) -> Tensor:
    """Changes the colour of each image at random.

    An operation costs only for the samples that it was drawn for. Keys are best kept on the CPU: then no step waits
    for the device.

    Args:
        photometry: what may change, and how much.
        images: [B, 3, H, W] on any device, uint8 or float in [0, 1]; they are not changed in place.
        keys: int64 [B], the randomness of each sample.
        salt: makes two views of one sample independent. The geometry of a view may share it.

    Returns:
        float32 [B, 3, H, W] in [0, 1].
    """
    images = images.float().div_(255) if images.dtype == torch.uint8 else images.to(torch.float32, copy=True)
    drawn = draw(photometry, keys.cpu(), salt)
    for place in range(4):
        for kind, adjust in enumerate(ADJUSTMENTS):
            if photometry.jitter[kind]:
                chosen = drawn.jitter & (drawn.order[:, place] == kind)
                _replace(images, chosen, adjust, drawn.factors[:, kind])
    _replace(images, drawn.gray, lambda chosen: grayscale(chosen).expand_as(chosen))
    width = photometry.blur_kernel or min(images.shape[2:]) // 10
    _replace(images, drawn.blur, lambda chosen, sigma: blur(chosen, sigma, width // 2), drawn.sigma)
    _replace(images, drawn.solarize, lambda chosen: solarize(chosen, photometry.solarize_threshold))
    return images


def draw(photometry: Photometry, keys: Tensor, salt: str) -> Draws:
    """Draws for keys int64 [B]; see `apply`."""
    u = uniform(keys, 13, f"{salt}/photometry")  # under the bare salt lie the draws of the view's geometry
    strength = torch.tensor(photometry.jitter, dtype=torch.float64, device=keys.device)
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64, device=keys.device)
    low = torch.where(centre > 0, (centre - strength).clamp(min=0), -strength)
    sigma_low, sigma_high = photometry.blur_sigma
    return Draws(
        jitter=u[:, 0] < photometry.jitter_p,
        gray=u[:, 1] < photometry.gray_p,
        blur=u[:, 2] < photometry.blur_p,
        solarize=u[:, 3] < photometry.solarize_p,
        factors=low + (centre + strength - low) * u[:, 4:8],
        order=u[:, 8:12].argsort(dim=1),
        sigma=sigma_low + (sigma_high - sigma_low) * u[:, 12],
    )


def _replace(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Puts `operation(chosen images, their parameters [b, 1, 1, 1])` in the place of the chosen ones."""
    index = chosen.nonzero()[:, 0]
    if len(index):
        values = [p[index].float().to(images.device, non_blocking=True)[:, None, None, None] for p in parameters]
        index = index.to(images.device, non_blocking=True)
        images[index] = operation(images[index], *values)


def grayscale(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with black: [B, 3, H, W], [B, 1, 1, 1] -> [B, 3, H, W]."""
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the mean grey: [B, 3, H, W], [B, 1, 1, 1] -> [B, 3, H, W]."""
    # In double, since the order of a sum in float, and so its rounding, may depend on the batch.
    mean = grayscale(images).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with greyscale: [B, 3, H, W], [B, 1, 1, 1] -> [B, 3, H, W]."""
    return (images * factor).add_(grayscale(images) * (1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the colour circle of HSV: [B, 3, H, W], turns [B, 1, 1, 1] -> [B, 3, H, W]."""
    red, green, blue = images.split(1, dim=1)
    low, value = torch.aminmax(images, dim=1, keepdim=True)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)  # grey has no hue, and keeps none: it is multiplied by its chroma
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    # A channel is `value` within a sixth of the circle around its own hue, `low` opposite, and linear in between.
    k = torch.cat([sixths + 5, sixths + 3, sixths + 1], dim=1).add_(6 * shift).remainder_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur, mirrored at the border (the outermost pixels are not repeated).

    Args:
        images: [B, 3, H, W].
        sigma: in pixels, [B, 1, 1, 1].
        radius: the kernel has 2 * radius + 1 pixels; at most as many as the mirror has.
    """
    rows, columns = (_blur_matrix(side, sigma, min(radius, side - 1)) for side in images.shape[2:])
    return (rows @ images @ columns.transpose(2, 3)).clamp_(0, 1)


def _blur_matrix(side: int, sigma: Tensor, radius: int) -> Tensor:
    """[B, 1, side, side]: a blur of one axis, with its mirrors, is a product with a banded matrix.

    Against a convolution grouped by sample it takes as long on a CPU at 224 pixels, and a GPU is best at products.
    """
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.softmax(-0.5 * (offset / sigma[:, :, 0]).square(), dim=2)  # [B, 1, K]
    source = (torch.arange(side, device=sigma.device)[:, None] + offset).abs()
    source = torch.minimum(source, 2 * (side - 1) - source)  # [side, K]
    band = torch.zeros(len(sigma), 1, side, side, device=sigma.device)
    shape = (len(sigma), 1, *source.shape)
    return band.scatter_add_(3, source.expand(shape), kernel[:, :, None].expand(shape))


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Inverts the values from the threshold on: [B, 3, H, W] -> [B, 3, H, W]."""
    return torch.where(images >= threshold, 1 - images, images)
