"""RandAugment (Cubuk et al. 2020) in timm's variants, by batch: samples are grouped by the operation they drew.

It works on bytes and rounds as Pillow does, since most of its operations are defined on bytes: those that look at one
pixel at a time are tables of 256 entries.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from workloads.data.keys import uniform
from workloads.data.transforms.photometry import IMAGENET_MEAN

MAX_LEVEL = 10.0  # magnitudes are tenths of what an operation can do
BY_TABLE = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Contrast", "Brightness")
BY_FILTER = ("Color", "Sharpness")
BY_GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
OPERATIONS = BY_TABLE + BY_FILTER + BY_GEOMETRY
FIRST_GEOMETRIC = len(BY_TABLE + BY_FILTER)


class RandAugment(BaseModel):
    """A policy: each image goes through `layers` operations, each drawn uniformly from fifteen.

    The defaults are timm's. Fine-tuning of MAE takes `RandAugment.parse("rand-m9-mstd0.5-inc1")` (He et al. 2022,
    table 9: RandAug (9, 0.5)).

    Attributes:
        magnitude: m, 0..10.
        layers: n, the number of operations.
        magnitude_std: deviation of the normal noise on the magnitude, drawn by operation; the sum is cut to 0..10.
        p: probability that a drawn operation is applied.
        increasing: whether every operation grows stronger with the magnitude. Otherwise posterising and solarising
            grow weaker, and the factors of colour, contrast, brightness and sharpness lie in 0.1..1.9 with 1 near 5.
        interpolation: of rotation, shear and translation.
        fill: what these leave empty, by channel in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    magnitude: float = Field(default=10, ge=0, le=MAX_LEVEL)
    layers: int = Field(default=2, ge=0)
    magnitude_std: float = Field(default=0.0, ge=0, le=100)  # above, timm draws it uniformly
    p: float = Field(default=0.5, ge=0, le=1)
    increasing: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    fill: tuple[float, float, float] = IMAGENET_MEAN

    @classmethod
    def parse(cls, name: str) -> RandAugment:
        """Reads timm's notation: "rand", then any of -m (magnitude), -n (layers), -mstd, -p and -inc.

        Raises:
            ValueError: the name has another form.
        """
        fields = {"m": "magnitude", "n": "layers", "mstd": "magnitude_std", "p": "p", "inc": "increasing"}
        first, *rest = name.split("-")
        sections = [re.fullmatch(r"(m|n|mstd|p|inc)([0-9.]+)", section) for section in rest]
        if first != "rand" or not all(sections):
            raise ValueError(f"got RandAugment {name!r}, expected a name such as 'rand-m9-n2-mstd0.5-p0.5-inc1'")
        return cls.model_validate({fields[section[1]]: section[2] for section in sections if section})


@dataclass(frozen=True)
class Layer:
    """What was drawn for each sample in one layer.

    Attributes:
        operation: int64 [B], place in OPERATIONS.
        applied: bool [B].
        argument: float64 [B], of the operation: degrees, bits kept, threshold, offset, factor, slope or share.
    """

    operation: Tensor
    applied: Tensor
    argument: Tensor


def apply(policy: RandAugment, images: Tensor, keys: Tensor, salt: str) -> Tensor:
    """Changes each image by the operations drawn for it; it pays for no others.

    Keys are best kept on the CPU: then no step waits for the device.

    Args:
        policy: what is drawn from.
        images: uint8 [B, 3, H, W] on any device; they are not changed in place.
        keys: int64 [B], the randomness of each sample.
        salt: makes two views of one sample independent. The geometry of a view may share it.

    Returns:
        uint8 [B, 3, H, W].
    """
    assert images.dtype == torch.uint8, f"RandAugment works on bytes, not on {images.dtype}"
    images = images.clone()
    for layer in draw(policy, keys.cpu(), salt):
        group = layer.operation.clamp(max=FIRST_GEOMETRIC)  # those from there on are one resampling
        for place in range(FIRST_GEOMETRIC + 1):
            index = ((group == place) & layer.applied).nonzero()[:, 0]
            if len(index):
                rows = index.to(images.device, non_blocking=True)
                images[rows] = _operate(policy, images[rows], layer.operation[index], layer.argument[index])
    return images


def _operate(policy: RandAugment, images: Tensor, operation: Tensor, argument: Tensor) -> Tensor:
    """One operation on all images, or a mixture of geometric ones; `operation` and `argument` [b] are on the CPU."""
    name = OPERATIONS[int(operation[0])]
    if name in BY_GEOMETRY:
        return warp(images, matrices(operation, argument, images), policy.fill, policy.interpolation)
    argument = argument.to(images.device, non_blocking=True)[:, None, None]
    if name in BY_TABLE:
        return look_up(images, table(name, images, argument))
    other = _luma(images) if name == "Color" else _smooth(images)
    return _blend(other.float(), images.float(), argument[..., None])


def draw(policy: RandAugment, keys: Tensor, salt: str) -> list[Layer]:
    """Draws for keys int64 [B]; see `apply`."""
    layers = uniform(keys, 4 * policy.layers, f"{salt}/randaugment").reshape(len(keys), policy.layers, 4)
    drawn = []
    for u in layers.unbind(1):
        operation = (u[:, 0] * len(OPERATIONS)).long()
        level = policy.magnitude + torch.zeros_like(u[:, 2])
        if policy.magnitude_std:
            level += policy.magnitude_std * torch.special.ndtri(u[:, 2])
        share = level.clamp(0, MAX_LEVEL) / MAX_LEVEL
        arguments = _arguments(share, torch.where(u[:, 3] < 0.5, -share, share), policy.increasing)
        drawn.append(Layer(operation, u[:, 1] < policy.p, arguments.gather(0, operation[None])[0]))
    return drawn


def _arguments(share: Tensor, signed: Tensor, increasing: bool) -> Tensor:
    """The arguments that timm gives at a share [B] of the maximal level, and at one of random sign -> [15, B]."""
    bits, threshold = (4 * share).floor(), (256 * share).floor()
    factor = 1.8 * share + 0.1
    if increasing:
        bits, threshold, factor = 4 - bits, 256 - threshold, (1 + 0.9 * signed).clamp(min=0.1)
    arguments = {
        **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), torch.zeros_like(share)),
        "Posterize": bits,
        "Solarize": threshold,
        "SolarizeAdd": (110 * share).floor(),
        **dict.fromkeys(("Contrast", "Brightness", "Color", "Sharpness"), factor),
        "Rotate": 30 * signed,
        **dict.fromkeys(("ShearX", "ShearY"), 0.3 * signed),
        **dict.fromkeys(("TranslateX", "TranslateY"), 0.45 * signed),
    }
    return torch.stack([arguments[name] for name in OPERATIONS])


def table(name: str, images: Tensor, argument: Tensor) -> Tensor:
    """What each value becomes: uint8 [B, 3, H, W], float64 [B, 1, 1] -> uint8 [B, 1 or 3, 256]."""
    value = torch.arange(256, device=images.device).expand(len(images), 1, 256)
    if name == "AutoContrast":
        low, high = images.flatten(2).aminmax(dim=2, keepdim=True)
        scale = torch.full_like(high, 255).double() / (high - low)  # `255 / x` would round the reciprocal first
        stretched = (value * scale - low * scale).clamp(0, 255)
        return torch.where(high > low, stretched, value).byte()
    if name == "Equalize":
        return _equalizing(images, value)
    if name == "Contrast":
        mean = (_luma(images).double().mean(dim=(2, 3)) + 0.5).floor()[:, :, None]
        return _blend(mean.float(), value.float(), argument)
    changed = {
        "Invert": lambda: 255 - value,
        "Posterize": lambda: value - value % 2 ** (8 - argument.long()),
        "Solarize": lambda: torch.where(value < argument, value, 255 - value),
        "SolarizeAdd": lambda: torch.where(value < 128, (value + argument.long()).clamp(max=255), value),
        "Brightness": lambda: _blend(torch.zeros_like(value).float(), value.float(), argument),
    }
    return changed[name]().byte()


def _equalizing(images: Tensor, value: Tensor) -> Tensor:
    """The table that makes the histogram flat, in Pillow's integers -> uint8 [B, 3, 256]."""
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    up_to = counts.cumsum(2)
    step = (pixels.shape[2] - counts.gather(2, pixels.amax(dim=2, keepdim=True))) // 255
    flat = (step // 2 + up_to - counts) // step.clamp(min=1)
    return torch.where(step > 0, flat.clamp(max=255), value).byte()


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """uint8 [B, 3, H, W], uint8 [B, 1 or 3, 256] -> uint8 [B, 3, H, W]."""
    return tables.expand(-1, 3, 256).gather(2, images.flatten(2).long()).view_as(images)


def _luma(images: Tensor) -> Tensor:
    """Pillow's grey, in its integers: uint8 [B, 3, H, W] -> int32 [B, 1, H, W]."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16


def _smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH: the mean over 3x3 pixels, the middle five times; the border stays."""
    smooth = images.clone()
    if min(images.shape[2:]) > 2:
        inner = images[:, :, 1:-1, 1:-1].int()
        total = F.avg_pool2d(images.float(), 3, stride=1, divisor_override=1).round().int() + 4 * inner
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26  # rounded
    return smooth


def _blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Pillow's: cut to 0..255, then to whole numbers."""
    return (start + factor.float() * (end - start)).clamp(0, 255).byte()


def matrices(operation: Tensor, argument: Tensor, images: Tensor) -> Tensor:
    """Where a pixel comes from: x, y -> a x + b y + c, d x + e y + f, as float64 [b, 6] on the CPU.

    Args:
        operation: int64 [b], places of geometric operations.
        argument: float64 [b]: degrees counter-clockwise, slopes, shares of the side.
        images: [b, 3, H, W], for their size.
    """
    H, W = images.shape[2:]
    matrix = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(operation), 1)
    entry = {"ShearX": (1, 1), "ShearY": (3, 1), "TranslateX": (2, W), "TranslateY": (5, H)}
    for name, (column, scale) in entry.items():
        drawn = operation == OPERATIONS.index(name)
        matrix[drawn, column] = scale * argument[drawn]
    drawn = operation == OPERATIONS.index("Rotate")
    radians = argument[drawn] * (math.pi / 180)
    sin, cos = radians.sin(), radians.cos()
    to_x, to_y = W / 2 * (1 - cos) + H / 2 * sin, H / 2 * (1 - cos) - W / 2 * sin  # the centre stays
    matrix[drawn] = torch.stack([cos, -sin, to_x, sin, cos, to_y], dim=1)
    return matrix


def warp(images: Tensor, matrix: Tensor, fill: tuple[float, float, float], interpolation: str) -> Tensor:
    """Resamples: uint8 [b, 3, H, W], float64 [b, 6] -> uint8 [b, 3, H, W].

    Bilinear is Pillow's; bicubic has torch's slightly sharper kernel (a = -0.75, Pillow: -0.5).
    """
    H, W = images.shape[2:]
    a, b, c, d, e, f = matrix.float().to(images.device, non_blocking=True)[:, :, None, None].unbind(1)
    x = torch.arange(W, device=images.device)[None, None, :] + 0.5
    y = torch.arange(H, device=images.device)[None, :, None] + 0.5
    # Elementwise: the rounding of a product of matrices may depend on the batch.
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    grid = torch.stack([2 * from_x / W - 1, 2 * from_y / H - 1], dim=3)
    sampled = F.grid_sample(images.float(), grid, mode=interpolation, padding_mode="border", align_corners=False)
    inside = (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
    background = torch.tensor(fill, device=images.device)[:, None, None].mul(255).round()
    return torch.where(inside[:, None], sampled.clamp_(0, 255), background).byte()
