"""The contrastive loss: each query should be most like the key at its own place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.parts.gather import first_row, gather, gather_with_gradient
from workloads.parts.precision import full_precision


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each query against all keys, the one at its place being right (van den Oord et al. 2018).

    Args:
        queries: [..., N, D]; rows need not be normalised.
        keys: [..., M, D], M >= N; query n belongs to key n.
        temperature: tau.

    Returns:
        [..., N] in float32, not scaled by tau.
    """
    with full_precision(queries.device):
        logits = F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).mT / temperature
    place = torch.arange(logits.shape[-2], device=logits.device)
    return -logits.log_softmax(dim=-1)[..., place, place]


def global_info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The same of [B, D] against the keys of all ranks, which get no gradient; mean over the queries of this rank."""
    everyone = gather(F.normalize(keys.float(), dim=-1))
    with full_precision(queries.device):
        logits = F.normalize(queries.float(), dim=-1) @ everyone.T / temperature
    place = first_row(len(queries)) + torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, place)


def masked_info_nce(logits: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
    """-log of the share that the positives of a row have in all of it that is not excluded; their sum is in the log.

    With one positive to a row it is cross-entropy. A row without positives says nothing: loss and gradient are 0.

    Args:
        logits: [..., N, M], divided by tau.
        positive: bool, of the same shape; those that are excluded too do not count.
        excluded: bool, of the same shape.

    Returns:
        [..., N] in float32.
    """
    x, positive = logits.float(), positive & ~excluded
    least = torch.finfo(x.dtype).min  # of -inf alone, logsumexp has no gradient
    loss = x.masked_fill(excluded, least).logsumexp(dim=-1) - x.masked_fill(~positive, least).logsumexp(dim=-1)
    return torch.where(positive.any(dim=-1), loss, 0.0)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The normalised temperature-scaled cross-entropy of two views (Chen et al. 2020), before the cross-entropy.

    Each feature is compared with both views of all images of all ranks but itself; the other view of its image is
    the right one. Gradients flow into all of them.

    Args:
        a: of one view, [B, D] of this rank; rows need not be normalised.
        b: of the other view.
        temperature: tau.

    Returns:
        Logits [2 B, 2 world * B] in float32, those of `a` first, and int64 [2 B], the right column of each.
    """
    both = F.normalize(torch.stack([a.float(), b.float()], dim=1), dim=-1)  # [B, 2, D]
    every = gather_with_gradient(both)
    place = first_row(len(a)) + torch.arange(len(a), device=a.device)
    logits = []
    for view in (0, 1):
        with full_precision(both.device):
            others, same = (both[:, view] @ every[:, v].T / temperature for v in (1 - view, view))
        logits.append(torch.cat([others, same.scatter(1, place[:, None], -torch.inf)], dim=1))
    return torch.cat(logits), place.repeat(2)
