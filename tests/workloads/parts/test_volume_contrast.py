"""The losses of the card (arXiv 2006.10511): its golden numbers, by its recipe, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.parts.volume_contrast import NEGATIVES, SIDE, global_terms, local_terms, regions, ring


def sines(*shape: int, k: float = 1, o: float = 0) -> Tensor:
    """The card's recipe: sin(k n + o) for n = 1, 2, ..., row by row."""
    return (k * torch.arange(1, math.prod(shape) + 1).double() + o).sin().view(shape)


# Two groups of [o1, a1, o2, a2], two rows each: four volumes, a slice and a view of each of two partitions.
GROUPS = sines(16, 3).view(4, 2, 2, 3)


@pytest.mark.parametrize(
    ("temperature", "per_row", "mean"), [(0.1, 1.889225851, 0.472306463), (1.0, 4.539499532, 1.134874883)]
)
def test_gd_golden(temperature: float, per_row: float, mean: float) -> None:
    terms = global_terms(GROUPS, "gd", temperature)
    assert len(terms) == 64
    assert terms.sum().item() / 16 == pytest.approx(per_row, rel=1e-6)
    assert terms.mean().item() == pytest.approx(mean, rel=1e-6)


def test_lr_golden() -> None:
    """Regions of one pixel of maps of 5 x 5."""
    f, g = (sines(2, 5, 5, o=o).flatten(1).T for o in (0, 0.3))  # [25, 2]
    negatives = {0: [10, 12], 2: [0, 4], 4: [12, 14]}
    terms = torch.cat([local_terms(f, g, negatives, 0.1), local_terms(g, f, negatives, 0.1)])
    assert len(terms) == 6 and terms.mean().item() == pytest.approx(5.478383564, rel=1e-6)


def test_ring_is_the_released_layout() -> None:
    """Rows [o1, a1, o2, a2] of each group: an original is matched with the rows S, 2 S and 3 S further on."""
    S, rows = 2, 16
    found = {tuple(pair) for a, b in ring(torch.arange(rows).view(4, 2, 2)) for pair in zip(*_flat(a, b), strict=True)}
    expected = set()
    for anchor in (row for row in range(rows) if row % (2 * S) < S):
        own, other, view_of_other = ((anchor + i * S) % rows for i in (1, 2, 3))
        expected |= {(anchor, own), (anchor, other), (other, view_of_other), (own, view_of_other)}
    assert found == expected


def _flat(a: Tensor, b: Tensor) -> tuple[list[int], list[int]]:
    return a.flatten().tolist(), b.flatten().tolist()


@pytest.mark.parametrize(("loss", "views"), [("gd", 2), ("gd_minus", 3)])
def test_equal_features_have_the_loss_of_chance(loss: str, views: int) -> None:
    """log(1 + negatives): of 16 rows in 2 partitions log 9."""
    terms = global_terms(torch.ones(4, views, 2, 3), loss, 0.1)
    assert torch.allclose(terms, torch.tensor(4 * views + 1.0).log(), atol=1e-6)
    assert loss != "gd" or terms[0].item() == pytest.approx(2.197225, abs=1e-6)


def test_one_slice_to_a_partition_is_nt_xent_without_the_own_views_among_the_negatives() -> None:
    z = sines(1, 3, 4, 5)
    terms = global_terms(z, "gd_minus", 0.5).view(2, 3, 4)  # both ways, pairs of views, slices
    rows = F.normalize(z[0].transpose(0, 1), dim=-1)  # [S, V, D]
    for s in range(4):
        others = torch.cat([rows[:s], rows[s + 1 :]]).flatten(0, 1)
        for way in (0, 1):
            for i, pair in enumerate(((0, 1), (0, 2), (1, 2))):
                a, b = rows[s, pair[way]], rows[s, pair[1 - way]]
                logits = torch.cat([(a @ b)[None], others @ a]) / 0.5
                expected = F.cross_entropy(logits, torch.tensor(0))
                assert terms[way, i, s].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("loss", "views"), [("gd", 2), ("gd_minus", 3)])
def test_slices_of_the_same_partition_are_no_negatives(loss: str, views: int) -> None:
    """Neither of the volume nor of any other: no gradient of what two volumes say reaches it in a third."""
    z = sines(5, views, 4, 6).float().requires_grad_()
    terms = global_terms(z, loss, 0.1).view(2, -1, 5, 4)  # both ways, pairs, volumes, partitions
    terms[:, :, 0, 2].sum().backward()  # volume 0 (with 1, in G^D), partition 2
    assert z.grad is not None
    matched = [0, 1] if loss == "gd" else [0]
    elsewhere = [volume for volume in range(5) if volume not in matched]
    assert not z.grad[elsewhere, :, 2].any()
    assert z.grad[elsewhere][:, :, [0, 1, 3]].abs().sum(dim=-1).gt(0).all(), "all others are"
    assert z.grad[matched, :, 2].abs().sum(dim=-1).gt(0).all()


def test_negatives_are_compared_with_the_first_of_a_pair() -> None:
    """f's region, among f's and g's: g's own places beside the positive mean nothing to it."""
    f, g = sines(2, 4, 3).float(), sines(2, 4, 3, o=0.3).float().requires_grad_()
    local_terms(f, g, {0: [1, 2]}, 0.1).sum().backward()
    assert g.grad is not None and not g.grad[:, 3].any() and g.grad[:, :3].abs().sum(dim=-1).gt(0).all()
    equal = local_terms(torch.ones(3, 13, 4), torch.ones(3, 13, 4), regions(12, 12)[1], 0.1)
    assert torch.allclose(equal, torch.tensor(11.0).log(), atol=1e-6) and equal.shape == (3, 13)


def test_thirteen_regions_with_five_neighbours() -> None:
    corners, negatives = regions(24, 48)
    assert len(set(corners)) == 13 == len(negatives)
    assert {(0, 0), (0, 45), (21, 0), (21, 45), (10, 22), (5, 11), (15, 33)} <= set(corners)
    assert all(y + SIDE <= 24 and x + SIDE <= 48 for y, x in corners)
    assert all(len(set(others)) == NEGATIVES and u not in others for u, others in negatives.items())
    small, _ = regions(7, 7)
    assert len(set(small)) == 13
    corners, negatives = regions(24, 24)
    nearest = {corners[v] for v in negatives[corners.index((10, 10))]}
    assert {(5, 5), (5, 15), (15, 5), (15, 15)} < nearest


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="got maps of 6 x 12, expected at least 7"):
        regions(6, 12)
    with pytest.raises(ValueError, match="raise batch_size"):
        global_terms(torch.ones(1, 2, 2, 3), "gd", 0.1)
