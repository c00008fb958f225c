from collections import Counter
from itertools import islice

import pytest
import torch

from workloads.data.manifest import DataError
from workloads.data.reader import Reader
from workloads.data.streaming import StreamReader, stream_manifest
from workloads.data.views import View

VIEWS = {"image": View(size=4)}


@pytest.fixture
def pipes(make_manifest, tmp_path):
    """Two commands that bring 10 and 6 samples; sample i is of grey i and label i % 3."""
    make_manifest([10, 6])
    return [f"pipe:cat {tmp_path}/set-{i:06d}.tar" for i in range(2)]


def reader_of(pipes, **options) -> StreamReader:
    return StreamReader(stream_manifest(pipes, 16, 3), VIEWS, **{"batch_size": 4, "window": 5} | options)


def greys(reader: StreamReader, steps: int, *rank: int) -> list[int]:
    return [int(v) for batch in reader.batches(0, steps, *rank) for v in batch["image"][:, 0, 0, 0]]


def test_samples_come_with_their_labels_mixed_and_again_when_the_stream_ends(pipes):
    reader = reader_of(pipes)
    assert reader.steps_per_epoch == 4
    seen = greys(reader, 40)
    assert set(seen) == set(range(16)) and seen[:16] != sorted(seen[:16])
    for batch in reader_of(pipes).batches(0, 3):
        assert batch["label"].tolist() == [int(v) % 3 for v in batch["image"][:, 0, 0, 0]]
        assert ((batch["index"] >= 0) & (batch["index"] < 16)).all()
    assert reader.busy_s > 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_different_samples(pipes, world_size):
    shares = [set(greys(reader_of(pipes, window=1), 1, rank, world_size)) for rank in range(world_size)]
    assert sum(map(len, shares)) == len(set.union(*shares)) == 4


def test_the_stream_is_the_same_for_a_seed_and_stops_when_closed(pipes):
    assert greys(reader_of(pipes), 6) == greys(reader_of(pipes), 6) != greys(reader_of(pipes, seed=1), 6)
    batches = reader_of(pipes).batches(0, 1_000_000)
    assert len(list(islice(batches, 3))) == 3
    batches.close()


def test_a_command_that_fails_or_brings_nothing_ends_the_job(tmp_path):
    for command in ("pipe:true", "pipe:cat /nowhere/at/all.tar"):
        with pytest.raises(DataError, match="expected a tar archive"):
            next(reader_of([command]).batches(0, 1))


def test_bad_samples_are_counted_and_too_many_end_the_job(make_manifest, tmp_path):
    make_manifest([10], corrupt=[3])
    pipe = [f"pipe:cat {tmp_path}/set-000000.tar"]
    reader = StreamReader(stream_manifest(pipe, 100, 3), VIEWS, batch_size=5, max_bad_share=0.5)
    indices = Counter(int(v) for batch in reader.batches(0, 4) for v in batch["image"][:, 0, 0, 0])
    assert 3 not in indices and any("000003" in why for why in reader.skipped.values())
    with pytest.raises(DataError, match="cannot be decoded, expected at most a share of 0"):
        list(StreamReader(stream_manifest(pipe, 100, 3), VIEWS, batch_size=5, max_bad_share=0).batches(0, 4))


def test_what_needs_an_index_refuses_a_stream(pipes):
    with pytest.raises(DataError, match="expected shards that can be indexed"):
        Reader(stream_manifest(pipes, 16, 3), VIEWS, batch_size=4)
    with pytest.raises(DataError, match="got epoch_samples=16, expected at least batch_size=32"):
        reader_of(pipes, batch_size=32)
    assert torch.equal(torch.from_numpy(stream_manifest(pipes, 3, 2).label.copy()), torch.tensor([-1, -1, -1]))
