"""Every sample of some shards with all of its members, as byte ranges: what `reshard` and `split` copy.

The header scan tells where each sample begins; it ends before the next one. So a sample is one ranged read, of
whatever kind and number its members are, and the index is some 30 bytes a sample besides the key.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workloads.data.indexing import here
from workloads.data.shard_writer import SampleError, Source
from workloads.data.shards import DataError, expand, read_classes, some
from workloads.data.sources import open_shard, sizes
from workloads.data.tarscan import BLOCK, TornError, members, scan, split_name
from workloads.data.unfinished import Arguments, fingerprint

END_MARK = bytes(2 * BLOCK)


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Samples in the order of the shards.

    Attributes:
        shards: absolute paths or URLs.
        keys: [N] strings, each once.
        shard: int32 [N], index into `shards`.
        start, end: int64 [N], the bytes of its shard that a sample is in.
        label: int64 [N], -1 where there is none.
        classes: names by class number from classes.txt; [] where there is none.
        bad: "file: member at offset N: why" of everything that is not among the samples.
    """

    shards: list[str]
    keys: NDArray[Any]
    shard: NDArray[np.int32]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    label: NDArray[np.int64]
    classes: list[str]
    bad: list[str]

    def __len__(self) -> int:
        return len(self.shard)

    def arguments(self) -> Arguments:
        """What decides about the bytes that are made of these samples."""
        return {"shards": self.shards, "content": [fingerprint(self.shards), sizes(self.shards)]}

    def source(self, row: int) -> Source:
        """A sample as what `write_dataset` takes; its key stays."""
        key = str(self.keys[row])
        return Source(self.where(row), lambda _: key, partial(self.read, row))

    def where(self, row: int) -> str:
        """`file: member at offset N` of a sample."""
        return f"{_name(self.shards[self.shard[row]])}: {self.keys[row]} at offset {self.start[row]}"

    def read(self, row: int) -> dict[str, bytes]:
        """All members of a sample by suffix.

        Raises:
            OSError: the shard cannot be read.
            SampleError: a member has no suffix, or the shard has changed.
        """
        chunk = _read(self.shards[self.shard[row]], int(self.start[row]), int(self.end[row])) + END_MARK
        found: dict[str, bytes] = {}
        key = None
        try:
            for member in members(io.BytesIO(chunk), len(chunk)):
                parts = split_name(member.name)
                if parts is None or member.fault:
                    continue
                key = parts[0] if key is None else key
                if parts[0] != key:  # a sample that the scan has set aside
                    break
                if not parts[1]:
                    raise SampleError(f"got the member {member.name!r}, expected a suffix behind the dot")
                found.setdefault(parts[1], chunk[member.data : member.data + member.size])
        except TornError as torn:  # behind the sample that is, unless the shard has changed
            if not found:
                raise SampleError(f"got other bytes than before ({torn.why}), expected the shard to stay") from torn
        return found


def index_samples(
    shards: str | list[str], *, prefix_keys: bool = False, on_shard: Callable[[str], None] = lambda _: None
) -> SampleIndex:
    """Reads the headers of all shards.

    Args:
        shards: what `expand` takes.
        prefix_keys: put the shard's name and a slash before each key, for shards that number their samples alike.
        on_shard: told each path when it is done.

    Raises:
        DataError: a shard cannot be read, a key is in two of them, or there is no sample.
    """
    paths = expand(shards)
    classes = read_classes(paths[0])
    keys, start, end, label, bad = [], [], [], [], list[str]()
    try:
        shard_bytes = sizes(paths)
        for path, size, found in zip(
            paths, shard_bytes, here(scan, paths, None if classes is None else len(classes)), strict=True
        ):
            prefix = f"{_name(path).removesuffix('.tar')}/" if prefix_keys else ""
            keys.append(np.array([prefix + key for key in found.keys], np.dtypes.StringDType()))
            start.append(np.array(found.offsets, np.int64))
            end.append(np.array([*found.offsets[1:], size][: len(found.offsets)], np.int64))
            label.append(np.array(found.labels, np.int64))
            bad += [f"{_name(path)}: {line}" for line in found.quarantined]
            on_shard(path)
    except OSError as error:
        raise DataError(f"got {error}, expected shards that can be read; check the paths") from error
    index = SampleIndex(
        paths,
        np.concatenate(keys),
        np.repeat(np.arange(len(paths), dtype=np.int32), [len(of_shard) for of_shard in keys]),
        np.concatenate(start),
        np.concatenate(end),
        np.concatenate(label),
        classes or [],
        bad,
    )
    if not len(index):
        raise DataError(f"got no sample in {len(paths)} shard(s) ({paths[0]} ...), expected some; {some(bad)}")
    if len(repeats := repeated(index.keys)):
        lines = [index.where(int(row)) for row in repeats[:2]]
        raise DataError(
            f"got {len(repeats)} keys in more than one shard ({'; '.join(lines)} ...), expected each once; give "
            "--prefix-keys, which puts the name of its shard before each key"
        )
    return index


def repeated(keys: NDArray[Any]) -> NDArray[np.int64]:
    """Rows whose key a row before has too, in their order."""
    order = np.argsort(keys, kind="stable")
    return np.sort(order[1:][keys[order[1:]] == keys[order[:-1]]])


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _read(path: str, start: int, end: int) -> bytes:
    with closing(open_shard(path)) as shard:
        return shard.read_at(start, end - start)
