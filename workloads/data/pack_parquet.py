"""Images in Parquet files: bytes, Hugging Face's {bytes, path}, or paths; read a few rows at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workloads.data.decode import decode
from workloads.data.pack import SAMPLES_PER_SHARD
from workloads.data.pack_files import (
    SPLITS,
    class_member,
    has_label,
    image_suffix,
    inside,
    key_part,
    numbered,
    order_classes,
    text_member,
)
from workloads.data.shard_writer import (
    Members,
    OnSample,
    Packed,
    SampleError,
    ShardLimit,
    Source,
    Split,
    nobody,
    write_dataset,
)
from workloads.data.shards import DataError
from workloads.data.unfinished import fingerprint

BATCH_ROWS = 64  # images are large: these are in memory at a time
# Else pyarrow holds a whole row group. What stays is a page of it: 1024 rows, if pyarrow has written the file.
STREAMED = {"pre_buffer": False, "memory_map": True}


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None where the files have no such thing."""

    image: str = "image"
    label: str | None = None
    key: str | None = None
    caption: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.image, self.label, self.key, self.caption) if name is not None]


def pack_parquet(
    files: Sequence[Path],
    out: Path,
    columns: Columns,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    force: bool = False,
    on_sample: OnSample = nobody,
) -> Packed:
    """Parquet files with a row for each image, in the order of the files and rows (`manta reshard` shuffles).

    Files whose names all start with train, val, test or the like go to these splits, as Hugging Face names them. Class
    names are those of the schema where `datasets` wrote them (ClassLabel), else the label's values in their order. Rows
    without a label (none, or -1) get none.

    Args:
        files: are read one after the other, a few rows at a time.
        out: the new folder.
        columns: the image column holds bytes, a struct of bytes and path, or paths relative to the file.
        samples_per_shard: at most.
        force: replace `out`, if it holds nothing but packed shards.
        on_sample: told the name of each row when it is done.

    Raises:
        DataError: a file or a column is missing or of another type, or an `out` that may not be replaced.
    """
    if not files:
        raise DataError("got no files, expected Parquet files; name them")
    schemas = [_schema(file, columns) for file in files]
    named = [_class_names(schema, columns.label) for schema in schemas]
    if any(names != named[0] for names in named):
        raise DataError(f"got other class names in some of the {len(files)} files, expected the same; pack each alone")
    classes = named[0] or order_classes({name for file in files for name in _label_values(file, columns.label)})
    labels = _Labels(classes, named=bool(named[0]))
    starts = [re.match(rf"({'|'.join(SPLITS)})\b", file.name) for file in files]
    split_of = [start[1] if start and all(starts) else "train" for start in starts]
    splits = {
        split: _split([file for file, name in zip(files, split_of, strict=True) if name == split], columns, labels)
        for split in sorted(set(split_of))
    }
    return write_dataset(
        splits,
        classes,
        out,
        limit=ShardLimit(samples=samples_per_shard),
        arguments={
            "command": "pack parquet",
            "files": [str(file.absolute()) for file in files],
            "columns": [columns.image, columns.label, columns.key, columns.caption],
            "samples_per_shard": samples_per_shard,
            "content": fingerprint(files),
        },
        force=force,
        on_sample=on_sample,
    )


def _schema(file: Path, columns: Columns) -> pa.Schema:
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"got {file}, which cannot be read ({error}), expected a Parquet file") from error
    for column in columns.names:
        if column not in schema.names:
            raise DataError(
                f"got no column {column!r} in {file}, expected one of {', '.join(schema.names)}; name another one"
            )
    kind = schema.field(columns.image).type
    if not (_is_bytes(kind) or _is_text(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
        raise DataError(
            f"got {kind} in the column {columns.image!r} of {file}, expected bytes, a struct of bytes and path, or "
            "paths; name another one"
        )
    return schema


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _class_names(schema: pa.Schema, label: str | None) -> list[str]:
    """Those that Hugging Face's `datasets` writes into the metadata, [] where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _label_values(file: Path, label: str | None) -> set[str]:
    if label is None:
        return set()
    with pq.ParquetFile(file, **STREAMED) as table:
        batches = table.iter_batches(columns=[label])
        return {str(value) for batch in batches for value in batch[label].unique().to_pylist() if has_label(value)}


@dataclass(frozen=True)
class _Labels:
    """Cells of the label column -> class numbers."""

    classes: list[str]
    named: bool  # by the schema: integers are class numbers, not names

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def number(self, value: Any) -> int | None:
        if not has_label(value):
            return None
        number = value if self.named and isinstance(value, int) else self._numbers.get(str(value), len(self.classes))
        if number >= len(self.classes):
            raise SampleError(f"got the label {value!r}, expected one of {len(self.classes)} classes")
        return number


def _split(files: Sequence[Path], columns: Columns, labels: _Labels) -> Split:
    rows = [pq.read_metadata(file).num_rows for file in files]
    repeated = _repeated_keys(files, columns.key)

    def sources_from(start: int) -> Iterator[Source]:
        before = 0
        for file, count in zip(files, rows, strict=True):
            for row, values in _rows(file, columns, start - before) if before + count > start else ():
                yield _source(file, row, values, columns, labels, before + row in repeated)
            before += count

    return Split(sum(rows), sources_from)


def _rows(file: Path, columns: Columns, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, values) from row `start` on; row groups before it are not read."""
    with pq.ParquetFile(file, **STREAMED) as table:
        row = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if row + size <= start:
                row += size
                continue
            for batch in table.iter_batches(BATCH_ROWS, [group], columns.names):
                skip = min(max(0, start - row), len(batch))
                yield from enumerate(batch.slice(skip).to_pylist(), row + skip)
                row += len(batch)


def _repeated_keys(files: Sequence[Path], column: str | None) -> set[int]:
    """Rows whose key a row before has too. Eight bytes a row are kept, not the keys."""
    if column is None:
        return set()
    digests: list[bytes] = []
    for file in files:
        with pq.ParquetFile(file, **STREAMED) as table:
            for batch in table.iter_batches(columns=[column]):
                keys = (key_part(str(key)) for key in batch[column].to_pylist())
                digests.append(b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys))
    numbers = np.frombuffer(b"".join(digests), np.uint64)
    first = np.unique(numbers, return_index=True)[1]
    return set(np.setdiff1d(np.arange(len(numbers)), first, assume_unique=True).tolist())


def _source(file: Path, row: int, values: dict[str, Any], columns: Columns, labels: _Labels, repeated: bool) -> Source:
    cell = values[columns.image]
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(data, str):
        data, path = None, data
    key = None if columns.key is None else values[columns.key]

    def read() -> Members:
        if columns.key is not None and (key is None or repeated):
            raise SampleError("got no key, expected one" if key is None else f"got the key {key!r} a second time")
        image = inside(file.parent, str(path)).read_bytes() if data is None else data
        decode(image)
        label = None if columns.label is None else labels.number(values[columns.label])
        members = {image_suffix(image): image, **class_member(label)}
        if columns.caption is not None and (caption := values[columns.caption]) is not None:
            members["txt"] = text_member(caption)
        return members

    stem = Path(path).stem if path else f"row{row}"
    return Source(f"{file.name}: row {row}", numbered(stem) if key is None else lambda _: key_part(str(key)), read)
