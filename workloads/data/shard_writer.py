"""Samples -> WebDataset shards with their manifest, all or nothing, the same bytes for the same input.

Bytes are copied as they are; owner, mode and times of members are fixed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

from workloads.data.decode import ImageError
from workloads.data.manifest import open_manifest
from workloads.data.shards import DataError, some
from workloads.data.tarscan import BLOCK
from workloads.data.unfinished import Arguments, Complete, Unfinished, resumable

MAX_THREADS = 16

OnSample = Callable[[str], None]
Members = Mapping[str, bytes]  # content by suffix: {"jpg": ..., "cls": b"3"}


class SampleError(ValueError):
    """A sample that cannot be used; it is left out and reported."""


@dataclass(frozen=True)
class Source:
    """One sample on its way into a shard.

    Attributes:
        name: for messages.
        key: of the sample, given its number among those that were written to its split.
        read: its members; raises OSError, ImageError or SampleError where it must be left out.
    """

    name: str
    key: Callable[[int], str]
    read: Callable[[], Members]


@dataclass(frozen=True)
class Split:
    """The samples of one split in a fixed order, from any position on."""

    count: int
    sources_from: Callable[[int], Iterator[Source]]

    @classmethod
    def of(cls, sources: Sequence[Source]) -> Split:
        return cls(len(sources), lambda start: (sources[i] for i in range(start, len(sources))))


@dataclass(frozen=True)
class ShardLimit:
    """When a shard is full: at so many samples, or before its members exceed so many bytes (one sample always fits)."""

    samples: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.samples is None) == (self.bytes is None) or (self.samples or self.bytes or 0) < 1:
            raise DataError(f"got {self}, expected either samples or bytes, 1 or more; give one of them")

    def has_room(self, samples: int, size: int, members: Members) -> bool:
        if self.samples is not None:
            return samples < self.samples
        assert self.bytes is not None
        return samples == 0 or size + tar_bytes(members) <= self.bytes


@dataclass
class Packed:
    """What was written.

    Attributes:
        out: the folder.
        classes: names by class number, [] where there are no labels.
        samples: number by split.
        shards: file names by split.
        bad: "file: why" of samples that were left out.
    """

    out: Path
    classes: list[str]
    samples: dict[str, int] = field(default_factory=dict)
    shards: dict[str, list[str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)


def nobody(name: str) -> None:
    """Nobody watches the progress."""


def tar_bytes(members: Members) -> int:
    """What a sample takes in an archive, headers and padding included."""
    return sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())


def write_dataset(
    splits: Mapping[str, Split],
    classes: list[str],
    out: Path,
    *,
    limit: ShardLimit,
    arguments: Arguments,
    force: bool,
    on_sample: OnSample,
    bad: Sequence[str] = (),
) -> Packed:
    """Writes `<split>-000000.tar`, ..., classes.txt and manifests into a new folder `out`.

    A run that was killed goes on after its last complete shard when it is repeated.

    Args:
        splits: samples by split.
        classes: names by class number.
        out: the folder; it appears when everything is written.
        limit: of a shard.
        arguments: all that decides about the bytes, a fingerprint of the input included.
        force: replace `out`, if it holds nothing but packed shards, and drop an unfinished run with other arguments.
        on_sample: told the name of each sample when it is done.
        bad: "file: why" of what was left out before.

    Raises:
        DataError: no sample can be used, `out` may not be replaced, or an unfinished run had other arguments.
    """
    packed = Packed(out, classes, bad=list(bad))
    with resumable(out, arguments, force=force) as work:
        for name, split in splits.items():
            _write_split(name, split, work, limit, on_sample, packed.bad)
            shards = [shard for shard in work.complete if shard.split == name]
            if shards:
                packed.shards[name] = [shard.shard for shard in shards]
                packed.samples[name] = sum(shard.samples for shard in shards)
        if not packed.samples:
            raise DataError(
                f"got no sample that can be packed, expected one or more; "
                f"{some(packed.bad) or 'check the folder and the names of its files'}"
            )
        if classes:
            (work.folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes), "utf-8")
        for shards_of_split in packed.shards.values():
            open_manifest([str(work.folder / shard) for shard in shards_of_split])
    return packed


def _write_split(
    name: str, split: Split, work: Unfinished, limit: ShardLimit, on_sample: OnSample, bad: list[str]
) -> None:
    """Writes the shards of one split that are not complete yet; "file: why" of all that was left out goes to `bad`."""
    from webdataset.writer import TarWriter

    done = [shard for shard in work.complete if shard.split == name]
    number = sum(shard.samples for shard in done)
    bad += [line for shard in done for line in shard.bad]
    left_out: list[str] = []  # since the last complete shard
    with closing(_good(split, done[-1].next_source if done else 0, left_out, on_sample)) as samples:
        ahead = next(samples, None)
        for shard_number in count(len(done)):
            if ahead is None:
                break
            shard = f"{name}-{shard_number:06d}.tar"
            written, size = 0, 0
            with (
                work.open(shard) as file,
                TarWriter(file, user="", group="", mtime=0, encoder=False, keep_meta=True) as tar,
            ):
                while ahead is not None and limit.has_room(written, size, ahead.members):
                    tar.write({"__key__": ahead.source.key(number + written), **ahead.members})
                    written, size = written + 1, size + tar_bytes(ahead.members)
                    ahead = next(samples, None)
            number += written
            work.add(Complete(name, shard, written, split.count if ahead is None else ahead.position, list(left_out)))
            bad += left_out
            left_out.clear()
    bad += left_out


class _Good(NamedTuple):
    position: int  # of the source in its split
    source: Source
    members: Members


def _good(split: Split, start: int, left_out: list[str], on_sample: OnSample) -> Generator[_Good]:
    """What can be read, in order; why the rest cannot goes to `left_out`."""
    with closing(_read_ahead(split.sources_from(start))) as outcomes:
        for position, (source, outcome) in enumerate(outcomes, start):
            try:
                members = outcome.result()
            except (OSError, ImageError, SampleError) as error:
                left_out.append(f"{source.name}: {error}")
            else:
                yield _Good(position, source, members)
            on_sample(source.name)


def _read_ahead(sources: Iterator[Source]) -> Generator[tuple[Source, Future[Members]]]:
    """Reads and checks a few samples at a time in threads (decoders let go of the interpreter), in order."""
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[Source, Future[Members]]] = deque()
    try:
        for source in sources:
            waiting.append((source, pool.submit(source.read)))
            if len(waiting) > 2 * threads:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)
