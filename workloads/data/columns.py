"""A manifest as columns: in memory while it is small, mapped from files when it is large.

It travels as one Parquet file. A large one is unpacked once, into plain arrays in the user's cache folder, and
mapped: a process then holds the pages that it touches, however many samples there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from workloads.data.order import permutation
from workloads.data.shards import DataError, some
from workloads.data.sources import is_remote

FORMAT = 2
MAX_ROWS_IN_MEMORY = 1 << 18  # 20 MB; above it columns are mapped
ROW_GROUP = 1 << 20
REBUILD = "if the shards are meant to have changed, run `manta inspect --rebuild` on them"

Rows = NDArray[np.int64]


class Places(NamedTuple):
    """Where one member of each sample is in its shard: int64 [N] each, in bytes; -1 where a sample has none."""

    offset: Rows
    length: Rows


class Keys:
    """Strings by number, as one blob and the places where each ends: [N]."""

    def __init__(self, ends: Rows, blob: NDArray[np.uint8]) -> None:
        self.ends, self.blob = ends, blob

    @classmethod
    def of(cls, keys: list[str]) -> Keys:
        encoded = [key.encode("utf-8", "surrogatepass") for key in keys]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(lengths.cumsum(), np.frombuffer(b"".join(encoded), np.uint8))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        row = range(len(self))[row]
        start = int(self.ends[row - 1]) if row else 0
        return self.blob[start : int(self.ends[row])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: Rows) -> Keys:
        return Keys.of([self[int(row)] for row in rows])


@dataclass(frozen=True, eq=False)
class Manifest:
    """All samples of a set of shards, as columns; row i is sample i.

    Attributes:
        shards: absolute paths or URLs.
        shard_bytes: their sizes.
        keys: the name that the members of a sample share.
        shard: int32 [N], index into `shards`.
        label: int64 [N], -1 where there is none.
        members: "image", "seg.png", ... -> where it is; see `tarscan.member_name`.
        primary: the member that every sample has.
        classes: names by class number.
        content_hash: SHA-256 of names, sizes, positions and labels (not of the pixels).
        total_bytes: of the primary members.
        quarantined: "file: member at offset N: why" of everything in the shards that is not among the samples.
    """

    shards: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    keys: Keys
    shard: NDArray[np.int32]
    label: Rows
    members: dict[str, Places]
    primary: str
    classes: list[str]
    content_hash: str
    total_bytes: int
    quarantined: list[str]

    def __post_init__(self) -> None:
        for column in self._columns().values():
            column.setflags(write=False)

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def indexed(self) -> bool:
        """False for what stands for a stream."""
        return bool(self.shard_bytes)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def mean_bytes(self) -> int:
        """Of the primary member."""
        return self.total_bytes // max(1, len(self))

    def places(self, member: str) -> Places:
        """Where a member is.

        Raises:
            DataError: no sample has it.
        """
        if member not in self.members:
            raise DataError(
                f"got a view of {member!r}, expected one of what the samples hold: {', '.join(self.members)}; "
                "choose another method or view, or pack the missing files with the samples"
            )
        return self.members[member]

    def where(self, row: int, member: str | None = None) -> str:
        """`file: member at offset N` of a sample."""
        name = self.shards[self.shard[row]].rsplit("/", 1)[-1]
        return f"{name}: {self.keys[row]} at offset {self.members[member or self.primary].offset[row]}"

    def take(self, rows: Rows) -> Manifest:
        """These rows, in this order, as a manifest of their own."""
        digest = hashlib.sha256(self.content_hash.encode() + np.asarray(rows, "<i8").tobytes())
        members = {name: Places(offset[rows], length[rows]) for name, (offset, length) in self.members.items()}
        return replace(
            self,
            keys=self.keys.take(rows),
            shard=self.shard[rows],
            label=self.label[rows],
            members=members,
            content_hash=digest.hexdigest(),
            total_bytes=int(members[self.primary].length.sum()),
        )

    def rows_per_class(self, per_class: int, seed: int) -> Rows:
        """Rows of `per_class` samples of each class, drawn by `seed`, in the order of the set.

        Raises:
            DataError: a class has fewer.
        """
        # Raw Philox words, not a Generator's methods: only the words are promised to stay the same between versions.
        drawn = permutation(seed, 0, 0, len(self))
        chosen = [drawn[self.label[drawn] == number][:per_class] for number in range(self.num_classes)]
        short = [
            f"{name} has {len(rows)}" for name, rows in zip(self.classes, chosen, strict=True) if len(rows) < per_class
        ]
        if short or not chosen:
            raise DataError(
                f"got per_class={per_class}, expected at most what each class has: "
                f"{some(short) or 'these samples have no labels'}; lower per_class or label more"
            )
        return np.sort(np.concatenate(chosen))

    def select(self, per_class: int, seed: int) -> Manifest:
        """A few-label subset: the rows of `rows_per_class` as a manifest of their own."""
        return self.take(self.rows_per_class(per_class, seed))

    def _columns(self) -> dict[str, NDArray[Any]]:
        """Every column by its name in the file; keys as two."""
        columns: dict[str, NDArray[Any]] = {"shard": self.shard, "label": self.label}
        for name, (offset, length) in self.members.items():
            columns |= {f"{name}/offset": offset, f"{name}/length": length}
        return columns

    def write(self, path: Path) -> None:
        """Replaces `path` atomically; shards below its folder are stored relative to it, so that both can move."""
        folder = str(path.absolute().parent) + os.sep
        facts = {
            "format": FORMAT,
            "shards": [shard.removeprefix(folder) for shard in self.shards],
            "shard_bytes": self.shard_bytes,
            "primary": self.primary,
            "classes": self.classes,
            "content_hash": self.content_hash,
            "total_bytes": self.total_bytes,
            "quarantined": self.quarantined,
        }
        columns = self._columns()
        starts = np.concatenate([[0], self.keys.ends])
        keys = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(),
            len(self),
            [None, pa.py_buffer(starts), pa.py_buffer(np.ascontiguousarray(self.keys.blob))],
        )
        table = pa.table({"key": keys} | columns).replace_schema_metadata({"manta": json.dumps(facts)})
        encoding = dict.fromkeys(columns, "DELTA_BINARY_PACKED") | {"key": "DELTA_BYTE_ARRAY"}
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(
                table,
                scratch,
                row_group_size=ROW_GROUP,
                compression="zstd",
                use_dictionary=False,
                column_encoding=encoding,
            )
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads what `write` wrote; a large one is mapped.

        Raises:
            DataError: it is no manifest of this format.
        """
        facts = read_facts(path)
        if facts is None:
            raise DataError(f"got {path} of another format, expected {FORMAT}; run `manta inspect --rebuild`")
        try:
            file = pq.ParquetFile(path)  # `pq.read_table` imports pandas: 0.3 s of every start
            if file.metadata.num_rows <= MAX_ROWS_IN_MEMORY:
                columns = {name: _joined(parts) for name, parts in _unpacked(file).items()}
            else:
                columns = _mapped(file, facts["content_hash"])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"got {path}, which cannot be read ({error}), expected a manifest; {REBUILD}") from error
        names = [name.removesuffix("/offset") for name in columns if name.endswith("/offset")]
        return cls(
            keys=Keys(columns["key/ends"], columns["key/blob"]),
            shard=columns["shard"],
            label=columns["label"],
            members={name: Places(columns[f"{name}/offset"], columns[f"{name}/length"]) for name in names},
            **facts,
        )


def read_facts(path: Path) -> dict[str, Any] | None:
    """The metadata of a manifest, None where another version wrote it; costs a few ms whatever its number of rows.

    Raises:
        DataError: it is no manifest.
    """
    try:
        facts: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"manta"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"got {path}, which cannot be read ({error}), expected a manifest; {REBUILD}") from error
    if facts.pop("format") != FORMAT:
        return None
    folder = str(path.absolute().parent)
    facts["shards"] = tuple(shard if is_remote(shard) else os.path.join(folder, shard) for shard in facts["shards"])  # noqa: PTH118
    facts["shard_bytes"] = tuple(facts["shard_bytes"])
    return facts


def _pieces(file: pq.ParquetFile) -> Iterator[dict[str, NDArray[Any]]]:
    """The columns of some rows at a time."""
    key_bytes = 0
    for batch in file.iter_batches(ROW_GROUP):
        piece = {name: np.from_dlpack(batch[name]) for name in batch.schema.names if name != "key"}
        keys = batch["key"].cast(pa.large_binary())
        starts = np.frombuffer(keys.buffers()[1], np.int64)[keys.offset : keys.offset + len(keys) + 1]
        blob = np.frombuffer(keys.buffers()[2] or b"", np.uint8)[starts[0] : starts[-1]]
        yield piece | {"key/ends": starts[1:] - starts[0] + key_bytes, "key/blob": blob}
        key_bytes += len(blob)


def _unpacked(file: pq.ParquetFile) -> dict[str, list[NDArray[Any]]]:
    parts: dict[str, list[NDArray[Any]]] = {}
    for piece in _pieces(file):
        for name, values in piece.items():
            parts.setdefault(name, []).append(values)
    return parts


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts)


def _mapped(file: pq.ParquetFile, content_hash: str) -> dict[str, NDArray[Any]]:
    """The columns as files in the cache, made once for each content, mapped."""
    folder = platformdirs.user_cache_path("manta") / "columns" / content_hash
    if not folder.is_dir():
        scratch = folder.with_name(f".{content_hash}.{os.getpid()}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            for piece in _pieces(file):
                for name, values in piece.items():
                    with open(scratch / f"{name.replace('/', '@')}.{values.dtype.str[1:]}", "ab") as file_of_column:
                        file_of_column.write(np.ascontiguousarray(values).data)
            try:
                scratch.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same bytes
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    columns = {}
    for column in folder.iterdir():
        name, dtype = column.name.replace("@", "/").rsplit(".", 1)
        columns[name] = np.memmap(column, dtype, "r") if column.stat().st_size else np.empty(0, dtype)
    return columns
