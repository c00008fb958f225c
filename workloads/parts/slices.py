"""2-D slices of volumes: which ones, and random views of them by batch, on the device where they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def one_of_each_part(first: Tensor, count: Tensor, u: Tensor) -> Tensor:
    """Splits the slices of each volume into S equal consecutive parts, and draws a slice of each.

    Slices that are left over at the end belong to no part. Where there are fewer than S, the last one stands for the
    parts that have none.

    Args:
        first: int64 [B], where the slices of each volume begin.
        count: int64 [B], how many there are, at least 1.
        u: draws in [0, 1), [B, S].

    Returns:
        int64 [B, S].
    """
    S = u.shape[1]
    size = (count // S).clamp(min=1)[:, None]
    part = torch.arange(S, device=u.device) * size  # [B, S]
    within = (u * size).floor().long()
    return first[:, None] + (part + within).minimum(count[:, None] - 1)


def take_slices(volumes: Tensor, index: Tensor) -> Tensor:
    """[B, C, D, H, W] and int64 [B, S] -> [B, S, C, H, W]."""
    rows = torch.arange(len(volumes), device=volumes.device)[:, None]
    return volumes.transpose(1, 2)[rows, index]


def window(images: Tensor, centre: Tensor, scale: Tensor, turn_rad: Tensor, *, nearest: bool = False) -> Tensor:
    """What lies in a window of each image, enlarged to the size of the image; 0 outside of it.

    Args:
        images: [N, C, H, W].
        centre: of the window as shares of height and width, [N, 2].
        scale: height and width of the window as a share of the image's, [N].
        turn_rad: by which the window is turned, [N].
        nearest: takes the nearest pixel rather than the four around, for numbers of classes.
    """
    H, W = images.shape[-2:]
    y, x = ((torch.arange(n, device=images.device) + 0.5) / n - 0.5 for n in (H, W))
    # Elementwise: `affine_grid` multiplies matrices by batch, whose rounding may depend on the batch.
    y, x = y[None, :, None] * H, x[None, None, :] * W  # pixels from the centre
    cos, sin, scale = (value.float()[:, None, None] for value in (turn_rad.cos(), turn_rad.sin(), scale))
    down, right = scale * (cos * y + sin * x) / H, scale * (cos * x - sin * y) / W
    centre = centre.float()[:, :, None, None]
    grid = 2 * torch.stack([centre[:, 1] + right, centre[:, 0] + down], dim=3) - 1  # [N, H, W, 2]
    return F.grid_sample(images, grid, mode="nearest" if nearest else "bilinear", align_corners=False)


def jitter(images: Tensor, shift: Tensor, factor: Tensor, *, most: float = 1.5) -> Tensor:
    """Brightness, then contrast about the mean of each image, then values clipped to [0, most].

    Args:
        images: [N, C, H, W], scaled to about [0, 1].
        shift: what is added, [N].
        factor: of the distance from the mean, [N].
        most: the largest value.
    """
    shift, factor = (value.float()[:, None, None, None] for value in (shift, factor))
    images = images + shift
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * factor + mean).clamp(0, most)
