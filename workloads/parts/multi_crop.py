"""Crops of several sizes through one network (multi-crop: SwAV, Caron et al. 2020, arXiv 2006.09882)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def multi_crop(encoder: nn.Module, crops: Sequence[Tensor]) -> list[Tensor]:
    """Crops [B_i, 3, H_i, W_i] -> features [B_i, ...] of each; those of one size are one batch of the encoder."""
    places: dict[torch.Size, list[int]] = {}
    for place, crop in enumerate(crops):
        places.setdefault(crop.shape[1:], []).append(place)
    features: dict[int, Tensor] = {}
    for same in places.values():
        together: Tensor = encoder(torch.cat([crops[place] for place in same]))
        features |= zip(same, together.split([len(crops[place]) for place in same]), strict=True)
    return [features[place] for place in range(len(crops))]
