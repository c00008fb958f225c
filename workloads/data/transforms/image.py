"""Executes a View on decoded images: geometry is drawn first, as data, then pixels are resampled.

What is drawn for a sample depends on its key, its size and the view, never on the batch, the rank or the worker that
it is in; so does the way in which it is resampled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from workloads.data.keys import uniform
from workloads.data.transforms import erasing, photometry, randaugment
from workloads.data.views import View, height_width

MAX_BATCHED_SIZE = 40  # 32 px: 10 us an image by batch, 18 one by one
# What F.interpolate(antialias=True) calls, with a place to write to.
_RESIZE = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa, "bicubic": torch.ops.aten._upsample_bicubic2d_aa}
CROP_TRIES = 10  # torchvision's; a crop that does not fit is drawn again


@dataclass(frozen=True)
class Geometry:
    """Where each sample's view lies in its image; what is cut out is first flipped, then rotated.

    Attributes:
        size: int64 [B, 2], width and height of the image in pixels.
        crop: int64 [B, 4], left, top, width and height of the cut in pixels.
        flip: bool [B].
        rotate_deg: float64 [B], counter-clockwise.
    """

    size: Tensor
    crop: Tensor
    flip: Tensor
    rotate_deg: Tensor

    def packed(self) -> Tensor:
        """As one float64 [B, 8], which travels in a batch: size, crop, flip, rotation."""
        columns = (self.size, self.crop, self.flip[:, None], self.rotate_deg[:, None])
        return torch.cat([column.double() for column in columns], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Geometry:
        """The inverse of `packed`."""
        return cls(packed[:, :2].long(), packed[:, 2:6].long(), packed[:, 6] > 0, packed[:, 7])

    @property
    def box(self) -> Tensor:
        """The cut as float32 [B, 4]: x0, y0, x1, y1 relative to the image, 0..1."""
        corner, extent = self.crop[:, :2], self.crop[:, 2:]
        return (torch.cat([corner, corner + extent], dim=1) / self.size.repeat(1, 2)).float()


def execute(
    view: View, images: Sequence[NDArray[np.uint8]], keys: Tensor | None = None, salt: str = ""
) -> tuple[Tensor, Geometry]:
    """Looks at each image through the view.

    Args:
        view: what to look at.
        images: B arrays, uint8 [H, W, 3], of any sizes.
        keys: int64 [B], the randomness of each sample; not needed where the view draws nothing.
        salt: makes two views of one sample independent.

    Returns:
        uint8 [B, 3, H, W] of the size of the view, and the geometry.
    """
    if keys is None:
        assert not view.draws, "a view that draws needs keys"
        keys = torch.zeros(len(images), dtype=torch.int64)
    size = torch.tensor([(image.shape[1], image.shape[0]) for image in images], dtype=torch.int64).reshape(-1, 2)
    geometry = draw(view, size, keys, salt)
    return render(view, images, geometry), geometry


def draw(view: View, size: Tensor, keys: Tensor, salt: str = "") -> Geometry:
    """Draws crop, flip and rotation of each sample.

    The crop is torchvision's RandomResizedCrop: a share of the area, uniform, and an aspect ratio, uniform in the
    logarithm; drawn again up to 10 times until it fits, else the largest centred crop within the ratios. A view of
    scale (1, 1) takes the largest centred part of its shape; of a square view that is as wide as the short side.

    Args:
        view: what to draw for.
        size: int64 [B, 2], width and height.
        keys: int64 [B].
        salt: see `execute`.
    """
    u = uniform(keys, 2 * CROP_TRIES + 4, salt)  # [B, 24]
    if view.crops:
        crop = _resized_crop(view, size, u[:, 4:], u[:, :2])
    else:
        height, width = height_width(view.size)
        W, H = size.unbind(1)
        extent = torch.stack([W.minimum(H * width // height), H.minimum(W * height // width)], dim=1).clamp(min=1)
        crop = torch.cat([(size - extent) // 2, extent], dim=1)
    return Geometry(size, crop, u[:, 2] < view.flip, (2 * u[:, 3] - 1) * view.rotate_deg)


def _resized_crop(view: View, size: Tensor, shape_draws: Tensor, place_draws: Tensor) -> Tensor:
    """[B, 2], [B, 2 * CROP_TRIES], [B, 2] -> int64 [B, 4]: left, top, width, height."""
    full = size.double()
    W, H = full[:, :1], full[:, 1:]
    low, high = view.crop_scale
    area = W * H * (low + (high - low) * shape_draws[:, :CROP_TRIES])
    log_low, log_high = (math.log(ratio) for ratio in view.crop_ratio)
    ratio = torch.exp(log_low + (log_high - log_low) * shape_draws[:, CROP_TRIES:])
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # [B, CROP_TRIES]
    fits = (w >= 1) & (w <= W) & (h >= 1) & (h <= H)
    first = fits.int().argmax(dim=1, keepdim=True)
    drawn = torch.cat([w.gather(1, first), h.gather(1, first)], dim=1)  # [B, 2]
    widest = torch.cat(
        [(H * view.crop_ratio[1]).round().minimum(W), (W / view.crop_ratio[0]).round().minimum(H)], dim=1
    )
    fitted = fits.any(dim=1, keepdim=True)
    extent = torch.where(fitted, drawn, widest.clamp(min=1))
    corner = torch.where(fitted, (place_draws * (full - extent + 1)).floor(), ((full - extent) / 2).round())
    return torch.cat([corner, extent], dim=1).long()


def render(view: View, images: Sequence[NDArray[np.uint8]], geometry: Geometry) -> Tensor:
    """Cuts, resizes, flips and rotates -> uint8 [B, 3, H, W].

    Crops are resized one by one with antialiasing; those that are enlarged bilinearly to a small size, where the calls
    would cost more than the pixels, go through one sampling for all images of a shape: the same resize, up to rounding.
    Rotation fills with black, as torchvision does.
    """
    H, W = height_width(view.size)
    batched = view.interpolation == "bilinear" and max(H, W) <= MAX_BATCHED_SIZE
    # One by one, the resize writes channels last, directly and twice as fast as into another layout.
    layout = torch.contiguous_format if batched else torch.channels_last
    pixels = torch.empty(len(images), 3, H, W, dtype=torch.uint8, memory_format=layout)
    resize = _RESIZE[view.interpolation].out
    whole: list[int] = []  # nothing to resize
    enlarged: dict[tuple[int, ...], list[int]] = defaultdict(list)
    crops, flips = geometry.crop.tolist(), geometry.flip.tolist()

    def cut(i: int) -> NDArray[np.uint8]:
        x, y, w, h = crops[i]
        cut_out = images[i][y : y + h, x : x + w]
        return cut_out[:, ::-1] if flips[i] else cut_out  # costs nothing: it is copied anyway

    for i, (_, _, w, h) in enumerate(crops):
        if (h, w) == (H, W) and not (batched and view.crops):
            whole.append(i)
        elif w <= W and h <= H and batched:
            enlarged[images[i].shape].append(i)
        else:
            # In a channels-last layout torch has a vectorised uint8 kernel; a contiguous copy of the cut keeps it.
            source = _channels_first(np.ascontiguousarray(cut(i))[None])
            resize(source, [H, W], False, None, None, out=pixels[i : i + 1])
    if whole:
        pixels[torch.tensor(whole)] = _channels_first(np.stack([cut(i) for i in whole]))
    for group in enlarged.values():
        stacked = np.stack([images[i] for i in group])
        if len(group) == len(images):  # saves to put them in their places
            pixels = _enlarge(stacked, geometry.crop, geometry.flip, (H, W))
        else:
            places = torch.tensor(group)
            pixels[places] = _enlarge(stacked, geometry.crop[places], geometry.flip[places], (H, W))
    if view.rotate_deg:
        pixels = _rotate(pixels, geometry.rotate_deg)
    return pixels


def _channels_first(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _enlarge(images: NDArray[np.uint8], crop: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of one crop an image: uint8 [b, H, W, 3], int64 [b, 4], bool [b] -> uint8 [b, 3, *size]."""
    _, H, W, _ = images.shape
    rows, columns = ((torch.arange(n) + 0.5) / n for n in size)
    x, y, w, h = crop.float()[:, :, None].unbind(1)  # each [b, 1]
    grid = torch.empty(len(images), *size, 2)  # filled in place: `stack` of expanded views costs twice the sampling
    # Sampling stops at the centres of the outer pixels of the crop, as if there were nothing beyond.
    across = x + (w * columns).clamp(min=0.5).minimum(w - 0.5)
    grid[..., 0] = (2 * torch.where(flip[:, None], across.flip(1), across) / W - 1)[:, None, :]
    grid[..., 1] = (2 * (y + (h * rows).clamp(min=0.5).minimum(h - 0.5)) / H - 1)[:, :, None]
    sampled = F.grid_sample(_channels_first(images).float(), grid, padding_mode="border", align_corners=False)
    return sampled.add_(0.5).to(torch.uint8)


def _rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Rotates each image about its centre, counter-clockwise: [B, 3, S, S], [B] -> [B, 3, S, S]."""
    # Elementwise: `affine_grid` multiplies matrices by batch, whose rounding may depend on the batch.
    S = pixels.shape[-1]
    centre = (2 * torch.arange(S) + 1) / S - 1
    x, y = centre[None, None, :], centre[None, :, None]
    radians = torch.deg2rad(degrees).float()[:, None, None]
    grid = torch.stack([radians.cos() * x - radians.sin() * y, radians.sin() * x + radians.cos() * y], dim=3)
    return F.grid_sample(pixels.float(), grid, align_corners=False).add_(0.5).to(torch.uint8)


def normalise(images: Tensor, view: View) -> Tensor:
    """uint8 [B, 3, H, W] on any device -> float32, of mean 0 and deviation 1 by the view's constants."""
    return _normalised(images.float(), view, 255)


def finish(images: Tensor, view: View, keys: Tensor, salt: str) -> Tensor:
    """What is left to do to a view on the device: colours, normalisation, erasing.

    Args:
        images: uint8 [B, 3, H, W] on any device.
        view: what to do.
        keys: int64 [B], best on the CPU, where numbers are drawn: then nothing waits for the device.
        salt: makes two views of one sample independent; the view's name.

    Returns:
        float32 [B, 3, H, W] on the same device.
    """
    if view.randaugment is not None:
        images = randaugment.apply(view.randaugment, images, keys, salt)
    if view.photometry is not None:
        finished = _normalised(photometry.apply(view.photometry, images, keys, salt), view, 1)
    else:
        finished = normalise(images, view)
    return finished if view.erasing is None else erasing.apply(view.erasing, finished, keys, salt)


def _normalised(images: Tensor, view: View, white: int) -> Tensor:
    """In place."""
    mean, std = (white * torch.tensor(values, device=images.device)[:, None, None] for values in (view.mean, view.std))
    return images.sub_(mean).div_(std)
