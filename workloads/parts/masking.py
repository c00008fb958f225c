"""Which patches a masked method hides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    ids_keep: Tensor  # [B, K] patches that stay visible, in shuffled order
    ids_restore: Tensor  # [B, L] puts the shuffled sequence back in image order
    mask: Tensor  # [B, L] 0 kept, 1 removed, in image order


def random_masking(noise: Tensor, ratio: float) -> Mask:
    """Keeps the int(L (1 - ratio)) patches of smallest noise.

    Args:
        noise: [B, L]; injectable, in full precision (argsort of half-precision noise gives ties). With how much a
            teacher looks at each patch (`attention_maps.cls_attention`, the mean over heads) for noise, the patches
            that matter most are hidden (AttMask-High, Kakogeorgiou et al. 2022, arXiv 2203.12719).
        ratio: share of patches that is removed.
    """
    B, L = noise.shape
    keep = int(L * (1 - ratio))
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    mask = torch.ones(B, L, device=noise.device)
    mask[:, :keep] = 0
    return Mask(ids_shuffle[:, :keep], ids_restore, mask.gather(1, ids_restore))


def expect_visible(L: int, ratio: float) -> None:
    """Raises ValueError where `random_masking` would keep none of L patches."""
    if int(L * (1 - ratio)) < 1:
        raise ValueError(
            f"got mask_ratio={ratio} for {L} patches, expected one visible patch at least; "
            f"use at most {1 - 1 / L:.3f}, or smaller patches"
        )


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gathers tokens [B, L, D] by ids [B, K] -> [B, K, D]."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))
