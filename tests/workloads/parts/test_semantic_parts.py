"""Parts from maps: what is foreground, its clusters, their numbers, and the loss over them."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from workloads.data.keys import sample_keys, uniform
from workloads.parts import semantic_parts
from workloads.parts.semantic_parts import ROUNDS, accepted_mean, erase, find_parts, foreground, kmeans

KEYS = sample_keys(0, 0, torch.arange(64))
H, W, C = 8, 4, 6


def bands(bounds: tuple[int, ...], order: tuple[int, ...] = (0, 1, 2), columns: int = 4) -> Tensor:
    """A map [8, 4, 6] of weak noise, and three bands of long tokens, of directions in this order, from the top."""
    x = 0.01 * torch.randn(H, W, C, generator=torch.Generator().manual_seed(1))
    for direction, (top, end) in zip(order, itertools.pairwise(bounds), strict=True):
        x[top:end, :columns, direction] += 5
    return x


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_are_numbered_from_top_to_bottom(order: tuple[int, ...]) -> None:
    """The card of SOLIDER: rows 0 to 2, 3 to 5, 6 to 7, whatever k-means calls its clusters."""
    x = bands((0, 3, 6, 8), order)[None].expand(8, -1, -1, -1).clone()
    x[:, :, 3] *= 0.001  # a column of background: else all are about equally long
    labels, accepted = find_parts(x, KEYS[:8], 3, salt="a")
    assert accepted.all()
    expected = torch.tensor([1, 1, 1, 2, 2, 2, 3, 3])[:, None].repeat(1, 4)
    expected[:, 3] = 0
    assert torch.equal(labels, expected.expand(8, -1, -1))


def test_views_without_enough_foreground_are_not_accepted() -> None:
    """The card of SOLIDER: all norms equal, or foreground of half or less."""
    half = bands((0, 3, 6, 8), columns=2)
    less, more = half.clone(), half.clone()
    less[0] *= 0.001
    more[0, 2, 0] += 5
    equal = torch.zeros(H, W, C)
    equal[..., 0] = torch.randint(0, 2, (H, W)) * 2 - 1.0
    fresh = torch.nn.functional.layer_norm(torch.randn(H, W, C, generator=torch.Generator().manual_seed(2)), (C,))
    found = find_parts(torch.stack([half, less, more, equal, 0 * equal, fresh]), KEYS[:6], 3, salt="a")
    assert found.accepted.tolist() == [False, False, True, False, False, False]
    assert [int(labels.max()) for labels in found.labels] == [0, 0, 3, 0, 0, 0]


def test_two_means_of_numbers_is_the_best_split() -> None:
    lengths = torch.rand(50, 9, generator=torch.Generator().manual_seed(0)) ** 2
    for row, above in zip(lengths, foreground(lengths), strict=True):

        def inertia(upper: Tensor, row: Tensor = row) -> float:
            return sum(float((part - part.mean()).square().sum()) for part in (row[upper], row[~upper]))

        splits = [row >= value for value in row.sort().values[1:]]
        assert inertia(above) == pytest.approx(min(inertia(split) for split in splits), rel=1e-5)
        assert row[above].min() > row[~above].max()


def test_k_means_is_as_good_as_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, 4, generator=generator)
    inside = torch.rand(16, 32, generator=generator) < 0.7
    labels = kmeans(x, inside, uniform(KEYS[:16], 30, "k").view(16, 10, 3))
    ours, theirs = [], []
    for tokens, label, mask in zip(x, labels, inside, strict=True):
        kept, of = tokens[mask], label[mask]
        parts = [kept[of == k] for k in range(3)]
        ours.append(sum(float((part - part.mean(dim=0)).square().sum()) for part in parts))
        theirs.append(KMeans(3, n_init=10, random_state=0).fit(kept.numpy()).inertia_)
    assert sum(ours) < 1.005 * sum(theirs), (ours, theirs)
    assert max(a / b for a, b in zip(ours, theirs, strict=True)) < 1.05


def test_rounds_are_enough_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 32, 16, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(64, 32, dtype=torch.bool)
    u = uniform(KEYS, 30, "k").view(64, 10, 3)
    few = kmeans(x, inside, u)
    monkeypatch.setattr(semantic_parts, "ROUNDS", 5 * ROUNDS)
    assert torch.equal(few, kmeans(x, inside, u))


def test_an_image_does_not_depend_on_its_batch_but_on_its_key_and_salt() -> None:
    x = torch.randn(32, H, W, C, generator=torch.Generator().manual_seed(0))
    whole = find_parts(x, KEYS[:32], 3, salt="a")
    assert 0 < whole.accepted.sum() < 32
    for i in (0, 7, 31):
        alone = find_parts(x[i : i + 1], KEYS[i : i + 1], 3, salt="a")
        assert torch.equal(alone.labels[0], whole.labels[i]) and alone.accepted[0] == whole.accepted[i]
    draws = [uniform(keys, 30, salt).view(32, 10, 3)[:, :1] for keys, salt in ((KEYS[:32], "a"), (KEYS[:32], "b"))]
    every = torch.ones(32, H * W, dtype=torch.bool)
    one, other = (kmeans(x.flatten(1, 2), every, u) for u in draws)
    assert not torch.equal(one, other), "one start of a map of noise depends on the draw"


def test_fewer_distinct_tokens_than_parts() -> None:
    x = bands((0, 4, 8, 8))
    x = x.round()
    x[0, 0] = 0
    labels, accepted = find_parts(x[None], KEYS[:1], 3, salt="a")
    assert accepted.all() and set(labels.unique().tolist()) == {0, 1, 2}
    assert labels[0, 1:4].unique().tolist() == [1] and labels[0, 4:].unique().tolist() == [2]


def test_shapes_are_known_without_values() -> None:
    labels, accepted = find_parts(torch.empty(3, H, W, C, device="meta"), KEYS[:3].to("meta"), 3, salt="a")
    assert labels.shape == (3, H, W) and accepted.shape == (3,)


def test_half_precision_around_it_changes_nothing() -> None:
    x = torch.randn(8, H, W, C, generator=torch.Generator().manual_seed(0))
    plain = find_parts(x, KEYS[:8], 3, salt="a")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(find_parts(x, KEYS[:8], 3, salt="a").labels, plain.labels)


def test_pixels_of_hidden_tokens_are_zero() -> None:
    hidden = torch.zeros(2, H, W, dtype=torch.bool)
    hidden[0, 2, 1] = True
    images = torch.rand(2, 3, 64, 32) + 1
    erased = erase(images, hidden)
    assert erased[0, :, 16:24, 8:16].abs().max() == 0
    assert (erased == 0).sum() == 3 * 8 * 8
    assert torch.equal(erased[1], images[1])


def test_golden_of_the_semantic_loss() -> None:
    """The card of SOLIDER: cross-entropies [2, 4] at lambda 1 and [6, 8] at lambda 0."""
    ce, lam = torch.tensor([[2.0, 4.0], [6.0, 8.0]]), torch.tensor([1.0, 0.0])
    assert accepted_mean(ce, lam, torch.tensor([True, True])).item() == 1.5
    assert accepted_mean(ce, lam, torch.tensor([True, False])).item() == 3
    assert accepted_mean(ce, lam, torch.tensor([False, True])).item() == 0
    assert accepted_mean(ce, lam, torch.tensor([False, False])).item() == 0


def test_ranks_of_unequal_numbers_of_accepted_images_have_the_mean_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values, lam = torch.rand(8, 2, 3, generator=generator), torch.rand(8, generator=generator)
    accepted = torch.tensor([1, 0, 0, 0, 1, 1, 0, 1]).bool()
    whole = accepted_mean(values, lam, accepted)
    assert whole.item() == pytest.approx((values[accepted] * lam[accepted, None, None]).mean().item(), rel=1e-6)
    monkeypatch.setattr(semantic_parts, "gather", lambda _: torch.tensor([1, 3]))
    halves = [accepted_mean(values[part], lam[part], accepted[part]) for part in (slice(4), slice(4, 8))]
    assert torch.stack(halves).mean().item() == pytest.approx(whole.item(), rel=1e-6)
