"""The parts of a person without labels: what stands above what in a map of features (SOLIDER, Chen et al. 2023).

arXiv 2303.17602. Everything is by image, of fixed shapes, and drawn from the key of the image: so it does
not matter with which others an image is in a batch, and nothing waits for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.data.keys import uniform
from workloads.parts.gather import gather
from workloads.parts.precision import full_precision

STARTS = 10  # of k-means, of which the best is taken: scikit-learn's, as in the released code
ROUNDS = 20  # of each start; some tens of tokens are settled long before
SPREAD = 1e-4  # lengths that differ by a smaller share are equal: a fresh LayerNorm leaves no more than rounding


class Parts(NamedTuple):
    labels: Tensor  # int64 [N, h, w], 0 background, 1..K from top to bottom; all 0 where the image is not accepted
    accepted: Tensor  # bool [N]


@torch.no_grad()
def find_parts(features: Tensor, keys: Tensor, K: int, *, salt: str) -> Parts:
    """Foreground by length, its tokens in K clusters, the clusters in the order of their mean row.

    Accepted are images of which more than half is foreground.

    Args:
        features: maps [N, h, w, C].
        keys: int64 [N], the randomness of each image.
        K: parts.
        salt: makes two views of one image independent.
    """
    x = features.detach().float().flatten(1, 2)
    front = foreground(x.norm(dim=2))
    accepted = front.sum(dim=1) > 0.5 * x.shape[1]
    u = uniform(keys, STARTS * K, salt).view(len(x), STARTS, K)
    with full_precision(x.device):
        clusters = kmeans(x, front, u)
    rows = torch.arange(features.shape[1], device=x.device).repeat_interleave(features.shape[2])
    labels = ranked(clusters, front, rows, K) * accepted[:, None]
    return Parts(labels.unflatten(1, features.shape[1:3]), accepted)


def foreground(lengths: Tensor) -> Tensor:
    """2-means of numbers [N, L], the best one: which are in the cluster of the larger centre, bool [N, L].

    None is where all are equal.
    """
    ordered = lengths.double().sort(dim=1).values
    L = ordered.shape[1]
    low = torch.arange(1, L, device=lengths.device)  # how many are in the cluster of the smaller centre
    below = ordered.cumsum(dim=1)[:, :-1]
    gap = (ordered.sum(dim=1, keepdim=True) - below) / (L - low) - below / low  # between the centres
    best = (low * (L - low) * gap.square()).argmax(dim=1, keepdim=True)
    differ = ordered[:, -1:] - ordered[:, :1] > SPREAD * ordered[:, -1:]
    return (lengths >= ordered.gather(1, best + 1)) & differ


def kmeans(x: Tensor, inside: Tensor, u: Tensor) -> Tensor:
    """Clusters of each image by Lloyd's rounds from the starts of k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        x: tokens [N, L, C], in float32.
        inside: bool [N, L], those that count; the others are told a cluster too.
        u: draws in [0, 1), float64 [N, starts, K].

    Returns:
        int64 [N, L] in 0..K-1, of the start of the least inertia. A cluster may be empty where tokens are equal.
    """
    inside = inside[:, None].float()  # [N, 1, L]
    x = x - (inside @ x) / inside.sum(dim=2, keepdim=True).clamp(min=1)  # distances are exact near the origin
    squares = x.square().sum(dim=2)[:, None]  # [N, 1, L]
    starts, K = u.shape[1:]
    names = torch.arange(K, device=x.device)[:, None]

    def distances(centres: Tensor) -> Tensor:
        """[N, M, C] -> squared, [N, M, L]."""
        return (squares + centres.square().sum(dim=2)[:, :, None] - 2 * centres @ x.mT).clamp(min=0)

    p = inside.expand(-1, starts, -1)
    chosen: list[Tensor] = []
    for j in range(K):
        cumulated = p.double().cumsum(dim=2)
        pick = (cumulated <= u[:, :, j, None] * cumulated[:, :, -1:]).sum(dim=2).clamp(max=x.shape[1] - 1)
        chosen.append(x.gather(1, pick[:, :, None].expand(-1, -1, x.shape[2])))
        p = inside * distances(chosen[-1]) if j == 0 else torch.minimum(p, inside * distances(chosen[-1]))
    centres = torch.stack(chosen, dim=2)  # [N, starts, K, C]

    def nearest() -> tuple[Tensor, Tensor]:
        """The least distance and its cluster, [N, starts, L] each."""
        least, label = distances(centres.flatten(1, 2)).unflatten(1, (starts, K)).min(dim=2)
        return least, label

    for _ in range(ROUNDS):
        _, label = nearest()
        members = (label[:, :, None] == names) * inside[:, :, None]  # [N, starts, K, L]
        count = members.sum(dim=3, keepdim=True)
        means = (members.flatten(1, 2) @ x).unflatten(1, (starts, K)) / count.clamp(min=1)
        centres = torch.where(count > 0, means, centres)
    least, label = nearest()
    best = (least * inside).sum(dim=2).argmin(dim=1)
    return label.gather(1, best[:, None, None].expand(-1, 1, x.shape[1]))[:, 0]


def ranked(clusters: Tensor, inside: Tensor, rows: Tensor, K: int) -> Tensor:
    """Clusters [N, L] in 0..K-1 -> 1..K by the mean row [L] of their tokens, from the top, and 0 of what is outside."""
    members = (clusters[:, None] == torch.arange(K, device=rows.device)[:, None]) * inside[:, None]  # [N, K, L]
    count = members.sum(dim=2)
    mean = torch.where(count > 0, (members * rows).sum(dim=2) / count.clamp(min=1), torch.inf)  # empty ones last
    rank = mean.argsort(dim=1, stable=True).argsort(dim=1)
    return (1 + rank.gather(1, clusters)) * inside


def erase(images: Tensor, hidden: Tensor) -> Tensor:
    """[N, 3, H, W] with the pixels of hidden tokens, bool [N, h, w], set to 0, the mean colour."""
    over = F.interpolate(hidden[:, None].to(images.dtype), size=images.shape[-2:], mode="nearest")
    return images * (1 - over)


def accepted_mean(values: Tensor, weight: Tensor, accepted: Tensor) -> Tensor:
    """Mean of weight times value over the tokens of the accepted images of all ranks; 0 where there are none.

    To be exact: the mean over ranks of what they return is that; and so it is of the gradients.

    Args:
        values: of each token, [N, ...].
        weight: of each image, [N].
        accepted: bool [N].
    """
    counts = gather(accepted.sum()[None])  # of each rank
    total = (values.flatten(1).mean(dim=1) * weight * accepted).sum()
    return total * len(counts) / counts.sum().clamp(min=1)
