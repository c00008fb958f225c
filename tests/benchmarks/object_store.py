"""What jobs ask of an object store: counted for one of each, then multiplied by the size of a fleet.

Which images a step reads, and how many of them a request brings, is counted over a manifest of ImageNet's size, through
the real order and reader, by a shard that only notes what it is asked for. How many requests a read, a manifest and a
checkpoint are on the wire is counted in front of a stand-in S3 server. No time is measured.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from tests.s3 import S3
from tests.toy import write_shards
from workloads.checkpoint import Checkpoints
from workloads.data import ranged, sources
from workloads.data.columns import Keys, Manifest, Places
from workloads.data.manifest import open_manifest
from workloads.data.order import WINDOW, Uniform
from workloads.data.ranged import read_members
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec_training import CheckpointPolicy

READS_PER_S, WRITES_PER_S = 5_500, 3_500  # of a prefix: "Optimizing Amazon S3 performance", Amazon S3 User Guide
TAR_BLOCK, SHARD_SAMPLES = 512, 1000
IMAGENET, IMAGENET_BYTES = 1_281_167, 115_000  # the training images, and their mean size: a tar of 147.9 GB
SHARDS = -(-IMAGENET // SHARD_SAMPLES)
SAMPLE_BYTES, WINDOWS = (IMAGENET_BYTES, 25_000), (WINDOW, 4096, 1024)
KEEP = 2  # checkpoints that stay, the default
GPUS, SAMPLES_PER_S = 8, 1000  # of a node, and of each GPU: assumed
CHECKPOINT_BYTES, CHECKPOINT_S = 3_000_000_000, 900  # of a job, and the time between two: assumed
PART_BYTES = 10 << 20  # of a file that pyarrow sends


@dataclass
class Noted:
    """A shard of zeros that notes how many bytes it was asked for."""

    size: int = 0
    reads: list[int] = field(default_factory=list)

    def read_at(self, offset: int, size: int) -> bytes:
        self.reads.append(size)
        return bytes(size)

    def close(self) -> None:
        """Nothing is open."""


def manifest_of(samples: int, sample_bytes: int) -> Manifest:
    """Images of one size each, in shards of a thousand in a bucket that is not there."""
    row, shards = np.arange(samples), -(-samples // SHARD_SAMPLES)
    entry = TAR_BLOCK * (1 + -(-sample_bytes // TAR_BLOCK))
    offset = row % SHARD_SAMPLES * entry + TAR_BLOCK
    return Manifest(
        shards=tuple(f"s3://bucket/train-{i:06d}.tar" for i in range(shards)),
        shard_bytes=(entry * SHARD_SAMPLES,) * shards,
        keys=Keys(np.zeros(samples, np.int64), np.empty(0, np.uint8)),
        shard=(row // SHARD_SAMPLES).astype(np.int32),
        label=np.full(samples, -1),
        members={"jpg": Places(offset, np.full(samples, sample_bytes))},
        primary="jpg",
        classes=[],
        content_hash="",
        total_bytes=samples * sample_bytes,
        quarantined=[],
    )


@dataclass(frozen=True)
class Reading:
    """What a sample costs on average."""

    requests: float
    bytes: float


def reading(
    sample_bytes: int,
    window: int = WINDOW,
    *,
    samples: int = IMAGENET,
    batch: int = 4096,
    ranks: int = GPUS,
    steps: int = 2,
) -> Reading:
    """By the first steps of a job; `batch` is global, `window` its `shuffle_window`."""
    manifest, order, noted = manifest_of(samples, sample_bytes), Uniform(samples, batch, window=window), Noted()
    with patch.object(ranged, "_open", lambda *_: noted):
        for step in range(steps):
            rows = order.batch(0, step)
            for rank in range(ranks):
                read_members(manifest, "jpg", rows[batch * rank // ranks : batch * (rank + 1) // ranks])
    return Reading(len(noted.reads) / (steps * batch), sum(noted.reads) / (steps * batch))


def opening(s3: S3, folder: Path, shards: int) -> Counter[str]:
    """Requests of a process of another machine that opens a set with a manifest, as each rank does."""
    folder.mkdir()
    pattern = write_shards(folder, "train", shards, shards)
    url = f"s3://{s3.bucket(sorted(folder.iterdir()))}/{Path(pattern).name}"
    with patch.dict(os.environ, s3.environment):
        for machine in ("first", "other"):
            sources._remote.cache_clear()
            before = len(s3.requests)
            with patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / machine)}):
                open_manifest(url)
    return kinds(s3.requests[before:])


def kinds(requests: Sequence[str]) -> Counter[str]:
    """How many there are of each method; LIST is a GET of a bucket."""
    return Counter("LIST" if "list-type" in request else request.split()[0] for request in requests)


def checkpoint(s3: S3, folder: Path, megabytes: int) -> Counter[str]:
    """Requests of a checkpoint of so many MiB, and of the log with it, once as many are in the mirror as stay there."""
    run = RunFolder(folder / "job")
    run.checkpoints.mkdir(parents=True)
    run.log.write_text("a line\n")
    method = torch.nn.Linear(megabytes << 18, 1, bias=False)
    optimizer = torch.optim.SGD(method.parameters())
    policy = CheckpointPolicy(keep=KEEP, mirror=f"s3://{s3.bucket()}/mirror")
    with patch.dict(os.environ, s3.environment), Checkpoints(run.checkpoints, policy, Ranks()) as writer:
        for step in range(1, KEEP + 2):
            before = len(s3.requests)
            writer.save(step, method, optimizer, extra={}, metric=None)
            writer.wait()
    return kinds(s3.requests[before:])


def reads(requests: Counter[str]) -> int:
    return requests["GET"] + requests["HEAD"] + requests["LIST"]


def writes(requests: Counter[str]) -> int:
    return requests["PUT"] + requests["POST"] + requests["DELETE"]


def checkpoint_writes(one_part: Counter[str], size: int) -> int:
    """Of a checkpoint of so many bytes, where that of a single part has been counted."""
    return writes(one_part) - 1 + -(-size // PART_BYTES)


@dataclass(frozen=True)
class Load:
    """On the store: requests and bytes a second, and requests when all jobs start at once."""

    shard_reads: float
    shard_bytes: float
    checkpoint_writes: float
    checkpoint_bytes: float
    starting: int


def load(nodes: int, of_sample: Reading, of_opening: int, of_checkpoint: int) -> Load:
    """Of so many nodes, each with a job of its own on all its GPUs.

    Args:
        nodes: of GPUS each.
        of_sample: what reading one costs.
        of_opening: requests of one rank that starts.
        of_checkpoint: requests of one checkpoint that write.
    """
    samples, checkpoints = nodes * GPUS * SAMPLES_PER_S, nodes / CHECKPOINT_S
    return Load(
        shard_reads=samples * of_sample.requests,
        shard_bytes=samples * of_sample.bytes,
        checkpoint_writes=checkpoints * of_checkpoint,
        checkpoint_bytes=checkpoints * CHECKPOINT_BYTES,
        starting=nodes * GPUS * of_opening,
    )


def row(nodes: int, of: Load) -> str:
    """Of the table in the README of `cluster/`."""
    read = f"{of.shard_reads:,.0f} | {of.shard_bytes / 1e9:,.1f} GB/s"
    written = f"{of.checkpoint_writes:,.1f} | {of.checkpoint_bytes / 1e9:.2f} GB/s"
    return f"| {nodes:,} | {read} | {written} | {of.starting:,} |"


def report(s3: S3, folder: Path, sizes: Sequence[int]) -> None:
    """Prints what was counted, and what follows from it for so many nodes."""
    print("\n| bytes of a sample | shuffle_window | requests a sample | bytes read for one of it |")
    print("| --- | --- | --- | --- |")
    for sample_bytes in SAMPLE_BYTES:
        for window in WINDOWS:
            found = reading(sample_bytes, window)
            print(f"| {sample_bytes:,} | {window:,} | {found.requests:.2f} | {found.bytes / sample_bytes:.2f} |")
    beside = reads(opening(s3, folder / "shards", 3)) - 3
    one_part = checkpoint(s3, folder / "checkpoint", 1)
    of_checkpoint = checkpoint_writes(one_part, CHECKPOINT_BYTES)
    print(f"\na rank that starts: a request for each shard and {beside} more")
    print(
        f"a checkpoint: {reads(one_part)} requests that read, {of_checkpoint} that write (one part: {dict(one_part)})\n"
    )
    print("| nodes | GET/s of shards | | PUT/s of checkpoints | | requests when all start at once |")
    print("| --- | --- | --- | --- | --- | --- |")
    of_sample = reading(IMAGENET_BYTES)
    for nodes in sizes:
        print(row(nodes, load(nodes, of_sample, SHARDS + beside, of_checkpoint)))
