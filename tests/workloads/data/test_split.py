from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workloads.data.manifest import open_manifest
from workloads.data.shards import DataError
from workloads.data.split import (
    assign,
    assign_groups,
    check_fractions,
    class_counts,
    largest_remainder,
    parse_fractions,
    split,
)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@st.composite
def shares(draw):
    weights = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    return [Fraction(weight, sum(weights)) for weight in weights]


@given(st.integers(0, 10**9), shares())
def test_largest_remainder_is_exact(count, shares):
    counts = largest_remainder(count, shares)
    assert sum(counts) == count
    assert all(abs(got - count * share) < 1 for got, share in zip(counts, shares, strict=True))


def test_largest_remainder_by_hand():
    assert largest_remainder(10, [Fraction("0.8"), Fraction("0.1"), Fraction("0.1")]) == [8, 1, 1]
    assert largest_remainder(7, [Fraction("0.5"), Fraction("0.3"), Fraction("0.2")]) == [4, 2, 1]
    assert largest_remainder(1, [Fraction("0.4"), Fraction("0.6")]) == [0, 1]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), shares())
def test_class_counts_are_exact_in_rows_and_columns(sizes, shares):
    counts = class_counts(sizes, shares)
    assert counts.sum(1).tolist() == sizes and counts.min() >= 0
    assert counts.sum(0).tolist() == largest_remainder(sum(sizes), shares)
    quotas = np.array([[size * float(share) for share in shares] for size in sizes])
    assert abs(counts - quotas).max() < (1 if len(shares) < 3 else 2)


@settings(max_examples=50)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=80), shares(), st.integers(0, 3))
def test_assigned_is_a_partition_with_those_counts(labels, shares, seed):
    labels = np.array(labels)
    part = assign(labels, shares, seed)
    names, sizes = np.unique(labels, return_counts=True)
    counts = class_counts(sizes.tolist(), shares)
    got = [[((part == s) & (labels == name)).sum() for s in range(len(shares))] for name in names]
    assert got == counts.tolist()
    assert (part == assign(labels, shares, seed)).all()


def test_the_seed_draws():
    labels, shares = np.zeros(200, np.int64), [Fraction(1, 2)] * 2
    first, second = assign(labels, shares, 1), assign(labels, shares, 2)
    assert 60 < (first == second).sum() < 140 and 30 < first[:100].sum() < 70


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), shares(), st.integers(0, 3))
def test_groups_stay_whole(names, shares, seed):
    groups = np.unique(names, return_inverse=True)[1]
    part = assign_groups(groups, shares, seed)
    assert all(len(set(part[groups == group])) == 1 for group in range(groups.max() + 1))
    off = np.bincount(part, minlength=len(shares)) - largest_remainder(len(groups), shares)
    assert off.max() < np.bincount(groups).max(), "only the last group given to a split can be too much"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 3), st.integers(1, 5))
def test_every_sample_is_in_exactly_one_split(tmp_path_factory, write_tar, sizes, seed, per_shard):
    folder = tmp_path_factory.mktemp("in")
    total = sum(sizes)
    names = iter(range(total))
    for shard, size in enumerate(sizes):
        numbers = [next(names) for _ in range(size)]
        files = [(f"{i:03d}.{s}", d) for i in numbers for s, d in (("txt", b"%d" % i), ("cls", b"%d" % (i % 2)))]
        write_tar(folder / f"s-{shard}.tar", files)
    fractions = parse_fractions("train=3/5,val=0.2,test=0.2")
    if min(largest_remainder(total, list(fractions.values()))) == 0:
        with pytest.raises(DataError, match="expected"):
            split(str(folder / "*.tar"), folder / "out", fractions, seed=seed)
        return
    packed = split(str(folder / "*.tar"), folder / "out", fractions, seed=seed, samples_per_shard=per_shard)
    assert list(packed.samples.values()) == largest_remainder(total, list(fractions.values()))
    keys = Counter()
    for name in fractions:
        manifest = open_manifest(str(folder / f"out/{name}-*.tar"))
        assert list(manifest.keys) == sorted(manifest.keys), "the order stays"
        assert all(int(key) % 2 == label for key, label in zip(manifest.keys, manifest.label, strict=True))
        keys.update(manifest.keys)
    assert keys == Counter(f"{i:03d}" for i in range(total))


def test_people_stay_together_and_it_continues_after_a_kill(tmp_path, write_tar):
    files = [(f"person{i % 7}_{i:02d}.txt", b"x") for i in range(40)]
    write_tar(tmp_path / "s-0.tar", files)

    def run(out, **options):
        fractions = parse_fractions("a=1/2,b=1/2")
        return split(str(tmp_path / "s-0.tar"), out, fractions, seed=0, group=r"(\w+)_", samples_per_shard=6, **options)

    packed = run(tmp_path / "whole")
    people = [{key.split("_")[0] for key in open_manifest(str(tmp_path / f"whole/{s}-*.tar")).keys} for s in "ab"]
    assert not people[0] & people[1] and len(people[0] | people[1]) == 7 and sum(packed.samples.values()) == 40
    seen = []

    def kill(name):
        seen.append(name)
        if len(seen) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", on_sample=kill)
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(DataError, match=r"got 40 keys that do not begin with 'x' \(person0_00; "):
        split(str(tmp_path / "s-0.tar"), tmp_path / "no", parse_fractions("a=1"), seed=0, group="x")
    with pytest.raises(DataError, match=r"regular expression '\('"):
        split(str(tmp_path / "s-0.tar"), tmp_path / "no", parse_fractions("a=1"), seed=0, group="(")


def test_real_photos_by_class(data_folder, tmp_path):
    fractions = parse_fractions("train=0.8,val=0.2")
    packed = split(str(data_folder / "photos/test-*.tar"), tmp_path / "out", fractions, seed=1)
    assert packed.samples == {"train": 240, "val": 60}
    counts = np.bincount(open_manifest(str(tmp_path / "out/val-*.tar")).label)
    assert len(counts) == 25 and set(counts.tolist()) == {2, 3}  # 12 of each class: 2.4


def test_fractions():
    assert parse_fractions("train=0.8, test=1/5") == {"train": Fraction(4, 5), "test": Fraction(1, 5)}
    check_fractions(parse_fractions("a=0.7,b=0.2,c=0.1"))
    for text, message in (
        ("train=0.8,test=0.1", "9/10 together, expected positive"),
        ("train=1.2,test=-0.2", "expected positive"),
        ("train", "expected NAME=FRACTION"),
        ("a=1/0", "expected NAME=FRACTION"),
        ("a=0.5,a=0.5", "got 'a' twice"),
        ("a/b=1", "got the split names"),
    ):
        with pytest.raises(DataError, match=message):
            check_fractions(parse_fractions(text))
