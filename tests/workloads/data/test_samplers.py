from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data.columns import Keys, Manifest, Places
from workloads.data.reader import Reader
from workloads.data.samplers import PK, Balanced, Episodes, Weighted
from workloads.data.shards import DataError
from workloads.data.views import View

many = settings(max_examples=60, deadline=None)
counts = st.lists(st.integers(1, 23), min_size=2, max_size=12)


def labels(numbers: list[int], unlabelled: int = 0) -> np.ndarray:
    """Labels of so many rows a class, mixed, and some without."""
    label = np.concatenate([np.repeat(np.arange(len(numbers)), numbers), np.full(unlabelled, -1)])
    return label[np.random.default_rng(0).permutation(len(label))]


def epoch(sampler, number: int = 0) -> list[np.ndarray]:
    return [sampler.batch(number, position) for position in range(sampler.steps_per_epoch)]


@many
@given(counts, st.integers(2, 5), st.integers(1, 12), st.integers(0, 3))
def test_pk_shows_every_image_and_p_different_identities_of_k_side_by_side(numbers, k, p, number):
    label, p = labels(numbers, unlabelled=3), min(p, len(numbers))
    sampler = PK(k=k).over(label, p * k, seed=7)
    batches = epoch(sampler, number)
    for batch in batches:
        identities = label[batch].reshape(p, k)
        assert (identities == identities[:, :1]).all() and len(set(identities[:, 0].tolist())) == p
    assert set(np.concatenate(batches).tolist()) == set(np.flatnonzero(label >= 0).tolist())
    groups = [-(-n // k) for n in numbers]
    assert len(batches) == max(-(-sum(groups) // p), max(groups)), "no batch more than the identities need"


@many
@given(counts, st.integers(2, 5))
def test_pk_repeats_an_image_in_a_group_only_when_there_are_too_few(numbers, k):
    label = labels(numbers)
    for batch in epoch(PK(k=k).over(label, 2 * k, seed=1)):
        for group in batch.reshape(2, k):
            assert len(set(group.tolist())) == min(k, numbers[label[group[0]]])


@many
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_episodes_have_classes_in_a_row_and_no_image_twice(ways, shots, queries, to_a_batch):
    each = shots + queries
    label = labels([each + i for i in range(6)] + [each - 1])
    config = Episodes(ways=ways, shots=shots, queries=queries, episodes=7)
    sampler = config.over(label, to_a_batch * ways * each, seed=3)
    assert sampler.steps_per_epoch == -(-7 // to_a_batch)
    for batch in epoch(sampler):
        for episode in batch.reshape(to_a_batch, ways, each):
            assert (label[episode] == label[episode[:, :1]]).all()
            assert len(set(label[episode[:, 0]].tolist())) == ways and len(set(episode.ravel().tolist())) == ways * each
            assert 6 not in label[episode], "a class with too few images is in none"


@many
@given(counts, st.integers(1, 4))
def test_balanced_gives_each_domain_its_share_and_visits_that_differ_by_one(numbers, share):
    label = labels(numbers, unlabelled=2)
    if max(numbers) < share:
        return
    sampler = Balanced().over(label, share * len(numbers), seed=5)
    seen: Counter[int] = Counter()
    for number in range(3):
        for batch in epoch(sampler, number):
            domains = label[batch].reshape(len(numbers), share)
            assert (domains == np.arange(len(numbers))[:, None]).all()
            seen.update(batch.tolist())
    for domain in range(len(numbers)):
        visits = [seen[int(row)] for row in np.flatnonzero(label == domain)]
        assert max(visits) - min(visits) <= 1


@many
@given(counts, st.integers(0, 2), st.data())
def test_weighted_visits_each_row_as_often_as_its_weight_says_to_less_than_one(numbers, number, data):
    label = labels(numbers, unlabelled=4)
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(numbers), max_size=len(numbers)))
    sampler = Weighted(classes=tuple(weights)).over(label, 2, seed=9)
    rows = np.concatenate(epoch(sampler, number))
    expected = np.where(label >= 0, np.array(weights)[np.maximum(label, 0)], 0)
    expected = expected * len(rows) / expected.sum()
    visits = np.bincount(rows, minlength=len(label))
    assert (np.abs(visits - expected) < 1 + 1e-6).all() and not visits[label < 0].any()


def test_weighted_without_weights_makes_classes_equal():
    label = labels([90, 10])
    rows = np.concatenate(epoch(Weighted().over(label, 10, seed=0)))
    assert np.bincount(label[rows]).tolist() == [50, 50]


@pytest.mark.parametrize(
    "config", [PK(k=2), Episodes(ways=2, shots=1, queries=1), Balanced(), Weighted()], ids=lambda c: type(c).__name__
)
def test_pure_in_seed_and_position_and_new_each_epoch(config):
    label = labels([9, 14, 11, 10])
    first, again, other = (config.over(label, 8, seed) for seed in (0, 0, 1))
    position = first.steps_per_epoch - 1
    assert (again.batch(2, position) == epoch(first, 2)[position]).all(), "asked for first, a batch is the same"
    assert not all((a == b).all() for a, b in zip(epoch(first, 0), epoch(first, 1), strict=True))
    assert not all((a == b).all() for a, b in zip(epoch(first), epoch(other), strict=True))
    assert set(first.alike(3).tolist()) == set(np.flatnonzero(label == label[3]).tolist())


@pytest.mark.parametrize(
    ("config", "numbers", "batch_size", "message"),
    [
        (PK(k=2), [3, 3], 5, "a multiple of k, at most 4; use batch_size=4"),
        (PK(k=2), [3, 3], 6, "2 identities"),
        (Episodes(ways=3, shots=1, queries=2), [5, 5, 2], 9, "got 2 classes of at least 3 images, expected 3"),
        (Episodes(ways=2, shots=1, queries=2), [5, 5], 7, "a multiple of an episode's 6 images; use 6"),
        (Balanced(), [5, 5, 5], 4, "for 3 domains, expected a multiple; use 3"),
        (Balanced(), [1, 1], 4, "a share of 2 in one domain"),
        (Weighted(classes=(1.0,)), [3, 3], 2, "got 1 weights, expected 2"),
        (Weighted(classes=(0.0, 0.0)), [3, 3], 2, "not all 0"),
        (Weighted(), [3], 4, "for 3 labelled samples"),
    ],
)
def test_what_does_not_fit_is_refused(config, numbers, batch_size, message):
    with pytest.raises(DataError, match=message):
        config.over(labels(numbers), batch_size, seed=0)


@pytest.mark.parametrize("config", [PK(k=2), Balanced(), Weighted()], ids=lambda c: type(c).__name__)
def test_labels_are_needed(config):
    with pytest.raises(DataError, match="no labels"):
        config.over(np.full(8, -1), 2, seed=0)


def test_ranks_share_a_batch_of_identities_contiguously():
    label = labels([8, 8, 8, 8])
    n = len(label)
    manifest = Manifest(
        shards=("x",), shard_bytes=(0,), keys=Keys.of(["k"] * n), shard=np.zeros(n, np.int32), label=label,
        members={"image": Places(np.zeros(n, np.int64), np.zeros(n, np.int64))}, primary="image", classes=list("abcd"),
        content_hash="", total_bytes=0, quarantined=[],
    )  # fmt: skip
    reader = Reader(manifest, {"image": View(size=4)}, batch_size=8, sampler=PK(k=2))
    whole = reader.rows(9)
    assert (np.concatenate([reader.rows(9, rank, 2) for rank in range(2)]) == whole).all()
    assert len(set(label[reader.rows(9, 0, 2)].tolist())) == 2
