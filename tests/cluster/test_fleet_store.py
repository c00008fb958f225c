"""What the README of `cluster/` says of the object store: its numbers are those of the real readers and writers."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from tests.benchmarks import object_store as store
from tests.benchmarks.fleet import SIZES
from tests.s3 import S3
from workloads.data.manifest import open_manifest
from workloads.data.ranged import read_members

README = (Path(__file__).parents[2] / "cluster" / "README.md").read_text()


@pytest.fixture(scope="module")
def one_part(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Requests that write a checkpoint of one part."""
    counted = store.checkpoint(s3_server, tmp_path_factory.mktemp("mirror"), 1)
    assert 0 < store.reads(counted) < 20  # and so beside what shards are asked
    return store.checkpoint_writes(counted, 1)


@pytest.mark.parametrize(("megabytes", "parts"), [(11, 2), (21, 3)])
def test_a_checkpoint_is_a_request_a_part_and_some(
    s3_server: S3, tmp_path: Path, one_part: int, megabytes: int, parts: int
) -> None:
    """So one of 3 GB, which nobody wants to send in a test, can be computed."""
    writes = store.writes(store.checkpoint(s3_server, tmp_path, megabytes))
    assert writes == one_part - 1 + parts == one_part - 1 + -(-(megabytes << 20) // store.PART_BYTES)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_a_rank_that_starts_asks_for_each_shard_and_four_things_more(
    s3_server: S3, tmp_path: Path, shards: int
) -> None:
    """Is there a manifest, what does it say, are there names of classes, which."""
    counted = store.opening(s3_server, tmp_path / "shards", shards)
    assert counted == {"HEAD": shards + 2, "GET": 2} and store.reads(counted) == shards + 4


def test_a_read_is_a_request(s3_server: S3, tmp_path: Path) -> None:
    """What `reading` counts as reads of a shard is what comes to the server, once the shards are open."""
    pattern = store.write_shards(tmp_path, "train", 600, 3, size=64)
    with patch.dict(os.environ, s3_server.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}):
        manifest = open_manifest(f"s3://{s3_server.bucket(tmp_path.glob('*.tar'))}/{Path(pattern).name}")
        rows = np.arange(0, 600, 150)
        noted = store.Noted()
        with patch.object(store.ranged, "_open", lambda *_: noted):
            read_members(manifest, manifest.primary, rows)
        before = len(s3_server.requests)
        read_members(manifest, manifest.primary, rows)
    assert store.kinds(s3_server.requests[before:]) == {"GET": len(noted.reads)} == {"GET": 4}


@pytest.mark.parametrize("sample_bytes", store.SAMPLE_BYTES)
@pytest.mark.parametrize("window", store.WINDOWS)
def test_the_readme_says_what_a_sample_costs(sample_bytes: int, window: int) -> None:
    found = store.reading(sample_bytes, window)
    cells = f"| {sample_bytes:,} | {window:,} | {found.requests:.2f} | {found.bytes / sample_bytes:.2f} |"
    assert cells in README


def test_the_readme_says_what_a_fleet_asks_for(one_part: int) -> None:
    of_sample = store.reading(store.IMAGENET_BYTES)
    of_checkpoint = one_part - 1 + -(-store.CHECKPOINT_BYTES // store.PART_BYTES)
    loads = [store.load(nodes, of_sample, store.SHARDS + 4, of_checkpoint) for nodes in SIZES]
    assert [
        store.row(nodes, load) for nodes, load in zip(SIZES, loads, strict=True) if store.row(nodes, load) not in README
    ] == []
    first = loads[0]
    for nodes, load in zip(SIZES, loads, strict=True):
        assert load.shard_reads == pytest.approx(first.shard_reads * nodes / SIZES[0])
        assert load.checkpoint_writes == pytest.approx(first.checkpoint_writes * nodes / SIZES[0])
