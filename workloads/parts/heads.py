"""What stands between an encoder and a contrastive loss, and is thrown away: projection heads."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from workloads.models.vit import ViT


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from width to width with ReLU between (MoCo v2, Chen et al. 2020, arXiv 2003.04297)."""
    modules: list[nn.Module] = []
    for width_in, width in pairwise(widths):
        modules += [nn.Linear(width_in, width), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def normed_mlp(*widths: int) -> nn.Sequential:
    """Linear layers without bias, each with BatchNorm, ReLU between (SimCLR v2, Chen et al. 2020, arXiv 2006.10029)."""
    modules: list[nn.Module] = []
    for width_in, width in pairwise(widths):
        modules += [nn.Linear(width_in, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def freeze_absorbed_bias(encoder: nn.Module) -> None:
    """Freezes the bias of a ViT's last norm, which `normed_mlp` behind it takes out again.

    Its gradient is nothing but rounding, which AdamW enlarges: the features that are exported would walk about.
    """
    if isinstance(encoder, ViT) and isinstance(encoder.norm, nn.LayerNorm):
        encoder.norm.bias.requires_grad_(False)


class Tower(nn.Module):
    """An encoder and its projection head; that of the keys is a slow copy of that of the queries (`ema.copy_of`).

    BatchNorm goes by the batch in both.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, dim] of unit length, in float32."""
        return F.normalize(self.projector(self.encoder(images)).float(), dim=1)
