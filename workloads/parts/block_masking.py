"""Block-wise masks: unions of rectangles (BEiT, Bao et al. 2022, algorithm 1) or cubes (MaskFeat, Wei et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workloads.data.keys import uniform

DRAWS = 6  # of a try: area, aspect ratio, top, left, length, start


def block_masking(
    keys: Tensor,
    window: tuple[int, int, int],
    n: int,
    *,
    min_area: int,
    max_area: int | None = None,
    aspect: float = 0.3,
    tries: int = 10,
    salt: str,
) -> Tensor:
    """Hides blocks one after the other until n cells are hidden, or until `tries` blocks in a row did not fit.

    A block is a rectangle of area U(min_area, max_area) and log-uniform aspect ratio, smaller than the window in height
    and width, for a length of time in 1..T. It is taken where it hides at least one more cell and no more than are
    left. So a mask may fall short of n, and never goes beyond.

    Args:
        keys: int64 [B], the randomness of each sample.
        window: (T, H, W) in cells; T = 1 for images.
        n: cells to hide.
        min_area: of a rectangle, in cells.
        max_area: of a rectangle; None: as many as are left to hide.
        aspect: height / width is drawn from [aspect, 1 / aspect].
        tries: 10 in BEiT, 100 for MaskFeat's cubes.
        salt: makes two masks of one sample independent.

    Returns:
        bool [B, T, H, W], True where hidden.
    """
    T, H, W = window
    B, device = len(keys), keys.device
    t, y, x = (torch.arange(size, device=device) for size in window)
    mask = torch.zeros(B, T, H, W, dtype=torch.bool, device=device)
    if mask.is_meta:  # only shapes are asked for
        return mask
    hidden = torch.zeros(B, dtype=torch.int64, device=device)
    failed = torch.zeros_like(hidden)
    log_aspect = math.log(1 / aspect)
    attempt = 0
    while bool((active := (hidden < n) & (failed < tries)).any()):
        u = uniform(keys, DRAWS, f"{salt}/{attempt}").unbind(1)
        attempt += 1
        left = n - hidden
        area = min_area + u[0] * ((left if max_area is None else max_area) - min_area)
        ratio = torch.exp((2 * u[1] - 1) * log_aspect)
        h, w = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        top, edge = (u[2] * (H - h + 1)).long(), (u[3] * (W - w + 1)).long()
        length = 1 + (u[4] * T).long()
        start = (u[5] * (T - length + 1)).long()
        block = (
            _between(t, start, length)[:, :, None, None]
            & _between(y, top, h)[:, None, :, None]
            & _between(x, edge, w)[:, None, None, :]
        )
        new = (block & ~mask).sum(dim=(1, 2, 3))
        fits = active & (h < H) & (w < W) & (new > 0) & (new <= left)
        mask |= block & fits[:, None, None, None]
        hidden += new * fits
        failed = torch.where(fits, 0, failed + 1)
    return mask


def _between(axis: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """[S], [B], [B] -> bool [B, S]."""
    return (axis >= start[:, None]) & (axis < (start + length)[:, None])
