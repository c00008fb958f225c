"""Real shards of any shape, read by any number of ranks and workers: by the keys of the samples that come out."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data.columns import Manifest
from workloads.data.indexing import build_manifest
from workloads.data.modalities import ArrayView
from workloads.data.reader import Reader

VIEWS = {"number": ArrayView()}


def npy(value: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(value))
    return file.getvalue()


Write = Callable[[Path, list[int]], Manifest]


@pytest.fixture(scope="session")
def write(write_tar: Callable[..., Path]) -> Write:
    """Shards of so many samples each, which hold their own numbers."""

    def make(folder: Path, samples_by_shard: list[int]) -> Manifest:
        first = 0
        for shard, samples in enumerate(samples_by_shard):
            members = [(f"{number:05d}.npy", npy(number)) for number in range(first, first + samples)]
            write_tar(folder / f"{shard:03d}.tar", members)
            first += samples
        return build_manifest(f"{folder}/*.tar")

    return make


def numbers(manifest: Manifest, start: int, stop: int, world_size: int = 1, workers: int = 0) -> list[list[int]]:
    """What each global batch holds, put together from what the ranks read."""
    readers = [Reader(manifest, VIEWS, batch_size=5, drop_last=False, workers=workers) for _ in range(world_size)]
    ranks = [reader.batches(start, stop, rank, world_size) for rank, reader in enumerate(readers)]
    found = []
    for shares in zip(*ranks, strict=True):
        assert all(batch["number"].equal(batch["index"]) for batch in shares if len(batch["index"]))
        found.append([number for batch in shares for number in batch["index"].tolist()])
    return found


shards = st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 12]), min_size=1, max_size=6).filter(any)


@settings(max_examples=25, deadline=None)
@given(samples_by_shard=shards, world_size=st.sampled_from([2, 3, 7]))
def test_uneven_empty_and_one_sample_shards_are_read_once_by_any_number_of_ranks(
    write: Write, samples_by_shard: list[int], world_size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = write(Path(folder), samples_by_shard)
        n = sum(samples_by_shard)
        steps = -(-n // 5)
        one = numbers(manifest, 0, 2 * steps)
        for epoch in (one[:steps], one[steps:]):
            assert sorted(number for batch in epoch for number in batch) == list(range(n))
        assert numbers(manifest, 0, 2 * steps, world_size) == one, "zip is strict: no rank ends before another"
        assert n < 8 or one[:steps] != one[steps:]


@pytest.fixture(scope="module")
def uneven(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("uneven"), [11, 1, 0, 31])


Stage = tuple[int, int]  # ranks, loader workers


@pytest.mark.parametrize(("before", "after"), [((3, 0), (1, 2)), ((1, 1), (7, 0))])
def test_resumed_with_other_ranks_and_workers_it_goes_on_at_the_next_sample(
    uneven: Manifest, before: Stage, after: Stage
) -> None:
    whole = numbers(uneven, 0, 20)
    assert numbers(uneven, 0, 7, *before) + numbers(uneven, 7, 20, *after) == whole


def test_a_start_far_inside_reads_nothing_of_what_came_before(
    uneven: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workloads.data import reader as module

    read: Callable[..., list[bytes]] = module.read_members
    rows: list[int] = []
    monkeypatch.setattr(module, "read_members", lambda m, name, r: rows.extend(r.tolist()) or read(m, name, r))
    (batch,) = numbers(uneven, 1_000_003, 1_000_004)
    assert sorted(rows) == sorted(batch)
