"""Shards -> a manifest: the headers of all shards are scanned, many shards at a time."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import repeat
from typing import Any, Protocol

import numpy as np

from workloads.data.columns import Keys, Manifest, Places
from workloads.data.shards import DataError, expand, read_classes, some, unreadable
from workloads.data.sources import CONNECTIONS, is_remote, sizes
from workloads.data.tarscan import PRIMARY, Scan, scan

MAX_MEMBERS = 32  # names of members that are kept; a set whose samples all differ must not become a million columns
MIN_PARALLEL_BYTES = 1 << 30  # starting processes pays above


class Mapper(Protocol):
    """Calls `function(path, num_classes)` for each path somewhere, and yields the answers in the order of the paths."""

    def __call__(
        self, function: Callable[[str, int | None], Scan], paths: list[str], num_classes: int | None
    ) -> Iterator[Scan]: ...


def here(function: Callable[[str, int | None], Scan], paths: list[str], num_classes: int | None) -> Iterator[Scan]:
    """On this machine: threads wait for remote shards, processes scan large local sets."""
    pool: Executor
    if any(map(is_remote, paths)):
        pool = ThreadPoolExecutor(min(CONNECTIONS, len(paths)))
    elif len(paths) > 1 and sum(sizes(paths)) > MIN_PARALLEL_BYTES and (os.cpu_count() or 1) > 1:
        pool = ProcessPoolExecutor(min(os.cpu_count() or 1, len(paths)), multiprocessing.get_context("spawn"))
    else:
        yield from map(function, paths, repeat(num_classes))
        return
    with pool:
        yield from pool.map(function, paths, repeat(num_classes))


def build_manifest(
    shards: str | list[str], on_shard: Callable[[str], None] = lambda _: None, mapper: Mapper = here
) -> Manifest:
    """Scans the headers of all shards.

    Args:
        shards: what `expand` takes.
        on_shard: called with each path when it is done.
        mapper: where the scans run.

    Raises:
        DataError: a shard cannot be read, or there is no usable sample in any of them.
    """
    paths = expand(shards)
    classes = read_classes(paths[0])
    scans: list[Scan] = []
    try:
        shard_bytes = sizes(paths)
        for done in mapper(scan, paths, None if classes is None else len(classes)):
            on_shard(paths[len(scans)])
            scans.append(done)
    except OSError as error:
        path = getattr(error, "filename", None) or paths[len(scans)]
        raise unreadable(path, error, "a tar shard") from error
    counts = Counter({name: sum(len(s.members.get(name, ())) for s in scans) for name in PRIMARY})
    primary = max(PRIMARY, key=lambda name: counts[name])  # of equals the first
    for s in scans:
        s.require(primary)
    names = [path.rsplit("/", 1)[-1] for path in paths]
    quarantined = [f"{name}: {line}" for name, s in zip(names, scans, strict=True) for line in s.quarantined]
    if not counts[primary] or not any(s.keys for s in scans):
        raise DataError(
            f"got no usable sample in {len(paths)} shard(s) ({paths[0]} ...), expected images, videos, volumes, "
            f"arrays or text: {some(quarantined) or 'the shards are empty'}"
        )
    labels = np.concatenate([np.array(s.labels, np.int64) for s in scans])
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(s.keys) for s in scans])
    members = _members(scans, len(labels))
    keys = Keys.of([key for s in scans for key in s.keys])
    digest = hashlib.sha256(json.dumps([names, shard_bytes, classes, list(members)]).encode())
    columns: list[Any] = [keys.ends, keys.blob, shard, labels]
    for column in columns + [part for places in members.values() for part in places]:
        digest.update(column.data)
    return Manifest(
        shards=tuple(paths),
        shard_bytes=tuple(shard_bytes),
        keys=keys,
        shard=shard,
        label=labels,
        members=members,
        primary=primary,
        classes=[str(number) for number in range(labels.max() + 1)] if classes is None else classes,
        content_hash=digest.hexdigest(),
        total_bytes=int(members[primary].length.sum()),
        quarantined=quarantined,
    )


def _members(scans: list[Scan], total: int) -> dict[str, Places]:
    """The most frequent members, by name."""
    counts: Counter[str] = Counter()
    for s in scans:
        counts.update({name: len(rows) for name, rows in s.members.items()})
    members = {}
    for name in sorted(dict(counts.most_common(MAX_MEMBERS))):
        columns: Any = np.full((2, total), -1, np.int64)
        start = 0
        for s in scans:
            if rows := s.members.get(name):
                columns[:, start + np.fromiter(rows, np.int64, len(rows))] = np.array(list(rows.values())).T
            start += len(s.keys)
        members[name] = Places(columns[0], columns[1])
    return members
