"""The head of DINO (Caron et al. 2021, arXiv 2104.14294, appendix C): features -> the logits of K prototypes."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """An MLP of three layers with GELU, a bottleneck of unit length, prototypes of unit length.

    A logit is a cosine. The last layer is weight-normalised (Salimans and Kingma 2016, arXiv 1602.07868) with a gain
    of 1: of a row of `last.weight` only the direction counts, its length sets how fast that turns.
    """

    def __init__(
        self, width: int, out_dim: int, *, hidden: int = 2048, bottleneck: int = 256, batch_norm: bool = False
    ) -> None:
        """
        Args:
            width: of the features.
            out_dim: K.
            hidden: of the hidden layers.
            bottleneck: of what is brought to unit length.
            batch_norm: behind the hidden layers, which then have no bias: it would be taken out again.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise((width, hidden, hidden)):
            layers.append(nn.Linear(width_in, width_out, bias=not batch_norm))
            layers += [nn.BatchNorm1d(width_out), nn.GELU()] if batch_norm else [nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for part in self.mlp:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        self.last = nn.Linear(bottleneck, out_dim, bias=False)

    def forward(self, features: Tensor, *, frozen: bool = False) -> Tensor:
        """[..., width] -> logits [..., K] in [-1, 1].

        `frozen`: the gradient of the last layer is zero, rather than none, which DDP would wait for.
        """
        v = self.last.weight
        if frozen:
            v = v.detach() + 0 * v
        return F.linear(F.normalize(self.mlp(features).float(), dim=-1), F.normalize(v.float(), dim=1))
