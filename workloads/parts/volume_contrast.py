"""What of a batch of volumes is alike (Chaitanya et al. 2020, arXiv 2006.10511): slices, and regions of their maps.

M volumes, V views of a slice of each of S partitions.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.parts.precision import full_precision

Pairs = list[tuple[Tensor, Tensor]]
SIDE, NEGATIVES = 3, 5  # pixels of a region, and how many others it is compared with; README of the released code


def ring(x: Tensor) -> Pairs:
    """G^D: each volume and the next one, [M, 2, ...]: both with their views, slices and views with each other."""
    if len(x) < 2:
        raise ValueError(
            "got a batch of one volume, expected several, which are matched with each other; raise batch_size, and "
            "leave micro_batch_size out"
        )
    (slices, views), (slices_of_next, views_of_next) = x.unbind(1), x.roll(-1, 0).unbind(1)
    return [(slices, views), (slices, slices_of_next), (slices_of_next, views_of_next), (views, views_of_next)]


def triples(x: Tensor) -> Pairs:
    """G^D-: each slice and its views, [M, 3, ...]."""
    return list(itertools.combinations(x.unbind(1), 2))


def global_terms(z: Tensor, loss: str, temperature: float) -> Tensor:
    """-log of the share of each positive beside all rows of the other partitions, both ways.

    Args:
        z: [M, V, S, D], V views of a slice of each partition of M volumes; need not be normalised.
        loss: gd or gd_minus.
        temperature: tau.

    Returns:
        float32 [terms].
    """
    S = z.shape[2]
    z_n = F.normalize(z.float().flatten(0, 2), dim=1)
    with full_precision(z.device):
        similarity = z_n @ z_n.T / temperature  # [M V S, M V S]
    row = torch.arange(len(z_n), device=z.device)
    pairs = (ring if loss == "gd" else triples)(row.view(z.shape[:3]))
    one, other = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    a, b = torch.cat([one, other]), torch.cat([other, one])
    same = row[:, None] % S == row % S
    negatives = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1)
    return F.softplus(negatives[a] - similarity[a, b])


def local_terms(f: Tensor, g: Tensor, negatives: dict[int, list[int]], temperature: float) -> Tensor:
    """-log of the share of region u of g beside the negatives of u in f and in g, from u of f.

    Args:
        f: regions of a map, [..., R, D]; need not be normalised.
        g: of the other.
        negatives: of each region that is asked; as many of each.
        temperature: tau.

    Returns:
        float32 [..., len(negatives)].
    """
    f, g = F.normalize(f.float(), dim=-1), F.normalize(g.float(), dim=-1)
    with full_precision(f.device):
        within, across = f @ f.mT / temperature, f @ g.mT / temperature  # [..., R, R]
    u, v = list(negatives), list(negatives.values())
    each = [[region] for region in u]
    others = torch.cat([within[..., each, v], across[..., each, v]], dim=-1).logsumexp(dim=-1)
    return F.softplus(others - across[..., u, u])


def regions(height: int, width: int) -> tuple[list[tuple[int, int]], dict[int, list[int]]]:
    """Top left corners of 13 regions, 3 x 3 of them over all the map and 4 between, and the nearest ones of each."""
    if min(height, width) < SIDE + 4:
        raise ValueError(
            f"got maps of {height} x {width}, expected at least {SIDE + 4} pixels a side for 13 regions; use a larger "
            "image_size or more decoder_blocks"
        )
    y, x = ([(side - SIDE) * quarter // 4 for quarter in range(5)] for side in (height, width))
    corners = [*itertools.product(y[::2], x[::2]), *itertools.product(y[1::2], x[1::2])]

    def nearest(u: int) -> list[int]:
        return sorted(range(len(corners)), key=lambda v: math.dist(corners[u], corners[v]))

    return corners, {u: [v for v in nearest(u) if v != u][:NEGATIVES] for u in range(len(corners))}
