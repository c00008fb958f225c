"""Histograms of oriented gradients (Dalal and Triggs 2005) as MaskFeat has them (Wei et al. 2022, arXiv 2112.09133).

Of images; those of a clip are its frames, so N below is B or B * T.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 9
"""Directions of 20 degrees each, without sign: a dark edge on bright is a bright one on dark."""


@torch.no_grad()
def hog(images: Tensor, cell: int = 8) -> Tensor:
    """What directions the gradients of each cell and channel have, weighted by their lengths, at unit length.

    A pixel votes for one bin. There is no Gaussian window, no interpolation between bins or cells, and no
    normalisation by blocks.

    Args:
        images: [N, C, H, W] in float32: under autocast too, since nothing but arithmetic by element is done here.
        cell: pixels of a side; it divides H and W.

    Returns:
        [N, C, 9, H / cell, W / cell]; 0 where nothing changes.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]  # [N, C, H, W + 2]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]  # [N, C, H + 2, W]
    gx = rows[..., :-2] - rows[..., 2:]  # Sobel
    gy = columns[..., :-2, :] - columns[..., 2:, :]
    direction = (torch.atan2(gx, gy) * (BINS / math.pi)).floor() % BINS  # x first: bin 0 begins at vertical gradients
    length = gx.hypot(gy)
    N, C, H, W = images.shape
    cells = (N, C, H // cell, cell, W // cell, cell)
    # bin by bin rather than by scatter_add, whose order of summation varies on GPUs
    votes = [(length * (direction == k)).view(cells).sum(dim=(3, 5)) for k in range(BINS)]
    return F.normalize(torch.stack(votes, dim=2), dim=2)


def hog_tokens(images: Tensor, patch: int, cell: int = 8) -> Tensor:
    """The histograms of each patch in the order (channel, bin, row of the cell, its column).

    Args:
        images: [N, C, H, W] in float32.
        patch: pixels of a side.
        cell: the same, of what a histogram is of; it divides `patch`.

    Returns:
        [N, L, C * 9 * (patch / cell)^2]: 108 for patches of 16 pixels and cells of 8.
    """
    side = patch // cell
    return F.unfold(hog(images, cell).flatten(1, 2), side, stride=side).transpose(1, 2)


def hog_pictures(tokens: Tensor, patch: int, cell: int = 8) -> Tensor:
    """Histograms drawn for people: in each cell a line along the edges of every bin, as bright as its share.

    Args:
        tokens: [N, L, C * 9 * (patch / cell)^2] in float32, of square images, as `hog_tokens` orders them.
        patch: as there.
        cell: as there.

    Returns:
        [N, C, H, W] in [0, 1].
    """
    side = patch // cell
    grid = side * round(tokens.shape[1] ** 0.5)
    maps = F.fold(tokens.transpose(1, 2), (grid, grid), side, stride=side)  # [N, C * 9, grid, grid]
    histograms = maps.reshape(-1, BINS, grid, grid).clamp(min=0)  # a prediction may be below 0
    pictures = F.conv_transpose2d(histograms, _lines(cell, tokens.device), stride=cell)  # [N * C, 1, H, W]
    return pictures.reshape(len(tokens), -1, grid * cell, grid * cell).clamp(max=1)


def _lines(cell: int, device: torch.device) -> Tensor:
    """A line through the middle of a cell for each bin, at right angles to its gradients: [9, 1, cell, cell]."""
    theta = ((torch.arange(BINS, device=device) + 0.5) * (math.pi / BINS))[:, None, None]
    offset = torch.arange(cell, device=device) - (cell - 1) / 2
    distance = (offset * theta.sin() + offset[:, None] * theta.cos()).abs()  # the gradient is (x, y) = (sin, cos)
    return (1 - distance).clamp(min=0)[:, None]
