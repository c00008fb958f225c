"""The contrastive loss: each query should be most like the key at its own place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.parts.gather import first_row, gather


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each query against all keys, the one at its place being right (van den Oord et al. 2018).

    Args:
        queries: [..., N, D]; rows need not be normalised.
        keys: [..., M, D], M >= N; query n belongs to key n.
        temperature: tau.

    Returns:
        [..., N] in float32, not scaled by tau.
    """
    logits = F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).mT / temperature
    place = torch.arange(logits.shape[-2], device=logits.device)
    return -logits.log_softmax(dim=-1)[..., place, place]


def global_info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The same of [B, D] against the keys of all ranks, which get no gradient; mean over the queries of this rank."""
    everyone = gather(F.normalize(keys.float(), dim=-1))
    logits = F.normalize(queries.float(), dim=-1) @ everyone.T / temperature
    place = first_row(len(queries)) + torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, place)
