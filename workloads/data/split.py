"""One set of shards -> several, each sample in exactly one: by class, by group, or by chance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workloads.data.order import permutation
from workloads.data.pack import SAMPLES_PER_SHARD
from workloads.data.sample_index import SampleIndex, index_samples
from workloads.data.shard_writer import OnSample, Packed, ShardLimit, Split, nobody, write_dataset
from workloads.data.shards import DataError, some

Fractions = dict[str, Fraction]


def split(
    shards: str | list[str],
    out: Path,
    fractions: Fractions,
    *,
    seed: int,
    group: str | None = None,
    by_class: bool = True,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    prefix_keys: bool = False,
    force: bool = False,
    on_sample: OnSample = nobody,
) -> Packed:
    """Writes `<name>-000000.tar`, ... for each fraction; samples keep their order and all their members.

    The number of samples of each split is exact (largest remainder), that of each class in it too but for one or so.
    With groups, whole groups are given out, the largest first, to the split that lacks most.

    Args:
        shards: what `expand` takes.
        out: the new folder.
        fractions: by name of the split, 1 together.
        seed: draws which samples go where.
        group: a regular expression that each key must begin with; samples with the same match (of its first
            parentheses, if it has any) are a group, which stays in one split: a person, a scene, a video.
        by_class: each class is split alike; samples without a label are a class of their own. Not with `group`.
        samples_per_shard: at most.
        prefix_keys: put the shard's name before each key, for shards that number their samples alike.
        force: replace `out`, if it holds nothing but packed shards.
        on_sample: told the name of each sample when it is done.

    Raises:
        DataError: fractions that are not 1 together, keys that do not begin with `group`, a split that would be empty,
            or an `out` that may not be replaced.
    """
    check_fractions(fractions)
    index = index_samples(shards, prefix_keys=prefix_keys)
    shares = list(fractions.values())
    if group is not None:
        part = assign_groups(_groups(index, group), shares, seed)
    else:
        part = assign(index.label if by_class else np.zeros(len(index), np.int64), shares, seed)
    rows = {name: np.flatnonzero(part == number) for number, name in enumerate(fractions)}
    if empty := [name for name, members in rows.items() if not len(members)]:
        raise DataError(
            f"got no sample for {', '.join(empty)} out of {len(index)}, expected one or more in each split; raise the "
            "fraction" + (" or make the groups smaller" if group else "")
        )
    return write_dataset(
        {name: _split(index, members) for name, members in rows.items()},
        index.classes,
        out,
        limit=ShardLimit(samples=samples_per_shard),
        arguments={
            "command": "split",
            **index.arguments(),
            "fractions": {name: str(share) for name, share in fractions.items()},
            "seed": seed,
            "group": group,
            "by_class": by_class,
            "samples_per_shard": samples_per_shard,
            "prefix_keys": prefix_keys,
        },
        force=force,
        on_sample=on_sample,
        bad=index.bad,
    )


def parse_fractions(text: str) -> Fractions:
    """`train=0.8,test=1/5` -> exact fractions by name.

    Raises:
        DataError: it is something else.
    """
    found: Fractions = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            share = Fraction(number.strip())
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(f"got {part!r}, expected NAME=FRACTION, as in train=0.8,val=0.1,test=0.1") from error
        if name.strip() in found:
            raise DataError(f"got {name.strip()!r} twice in {text!r}, expected each split once; rename one")
        found[name.strip()] = share
    return found


def check_fractions(fractions: Fractions) -> None:
    """Raises DataError unless all are positive, 1 together, and named so that `NAME-*.tar` finds each."""
    if wrong := [name for name in fractions if not re.fullmatch(r"\w+", name, re.ASCII)]:
        raise DataError(f"got the split names {wrong}, expected letters, digits and _ as in train; rename them")
    if min(fractions.values(), default=Fraction(0)) <= 0 or sum(fractions.values()) != 1:
        given = ",".join(f"{name}={share}" for name, share in fractions.items())
        raise DataError(f"got {given}, {sum(fractions.values())} together, expected positive fractions that make 1")


def largest_remainder(count: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers with the sum `count` (Hamilton's method): rounded down, what is left goes to the largest rests."""
    quotas = [count * share for share in shares]
    counts = [int(quota) for quota in quotas]
    rests = sorted(range(len(shares)), key=lambda i: counts[i] - quotas[i])
    for i in rests[: count - sum(counts)]:
        counts[i] += 1
    return counts


def class_counts(sizes: Sequence[int], shares: Sequence[Fraction]) -> NDArray[np.int64]:
    """How many samples of each class go to each split: int64 [C, S].

    Rows sum to the sizes, columns to the largest remainders of the whole. Each number is less than one off its share;
    with three splits or more and few samples a class now and then a little more, so that both sums are exact.
    """
    counts = np.array([largest_remainder(size, shares) for size in sizes], np.int64)
    quotas = np.array(sizes)[:, None] * np.array([float(share) for share in shares])
    surplus = counts.sum(0) - largest_remainder(sum(sizes), shares)
    while surplus.any():
        to, source = int(surplus.argmin()), int(surplus.argmax())
        over = counts - quotas
        may = np.flatnonzero(counts[:, source])
        order = np.argsort(over[may, to] - over[may, source], kind="stable")
        moved = may[order[: min(surplus[source], -surplus[to])]]
        counts[moved, source] -= 1
        counts[moved, to] += 1
        surplus = counts.sum(0) - largest_remainder(sum(sizes), shares)
    return counts


def assign(labels: NDArray[np.int64], shares: Sequence[Fraction], seed: int) -> NDArray[np.int64]:
    """The split of each sample, int64 [N], by labels int64 [N]: samples of a class are dealt out in a drawn order."""
    drawn = permutation(seed, 0, 0, len(labels))
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    counts = class_counts(np.unique(labels, return_counts=True)[1].tolist(), shares)
    part = np.empty(len(labels), np.int64)
    part[by_class] = np.repeat(np.tile(np.arange(len(shares)), len(counts)), counts.ravel())
    return part


def assign_groups(groups: NDArray[np.int64], shares: Sequence[Fraction], seed: int) -> NDArray[np.int64]:
    """The split of each sample, int64 [N], by the number of its group, int64 [N] in [0, G)."""
    sizes = np.bincount(groups)
    drawn = permutation(seed, 0, 0, len(sizes))
    lacks = largest_remainder(len(groups), shares)
    part = np.empty(len(sizes), np.int64)
    for number in drawn[np.argsort(-sizes[drawn], kind="stable")]:
        part[number] = max(range(len(shares)), key=lacks.__getitem__)
        lacks[part[number]] -= int(sizes[number])
    return part[groups]


def _groups(index: SampleIndex, expression: str) -> NDArray[np.int64]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise DataError(f"got the regular expression {expression!r} ({error}), expected a valid one") from error
    matches = [pattern.match(str(key)) for key in index.keys]
    if missed := [str(key) for key, match in zip(index.keys, matches, strict=True) if match is None]:
        raise DataError(
            f"got {len(missed)} keys that do not begin with {expression!r} ({some(missed)}), expected none; widen it"
        )
    names = [match[min(1, pattern.groups)] for match in matches if match is not None]
    numbers: dict[str | None, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _split(index: SampleIndex, rows: NDArray[np.int64]) -> Split:
    return Split(len(rows), lambda start: (index.source(int(row)) for row in rows[start:]))
