"""The manifest: what a set of shards holds, made once and kept beside them.

One Parquet file: a row for each sample, facts of the set as JSON in its metadata. With it
a reader knows every sample by its number, whatever the number of shards.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from workloads.data.shards import DataError, expand, read_classes, some
from workloads.data.tarscan import IMAGE_SUFFIXES, Scan, first_image, scan

__all__ = ["DataError", "Manifest", "build_manifest", "expand", "open_manifest", "peek"]

FORMAT = 1
PEEK_MEMBERS = 10_000  # headers that `peek` looks at before it gives up
REBUILD = "if the shards are meant to have changed, run `manta inspect --rebuild` on them"
_COLUMNS = {"shard": np.int32, "image_offset": np.int64, "image_length": np.int64, "label": np.int64}


@dataclass(frozen=True, eq=False)
class Manifest:
    """All samples of a set of shards, as columns; row i is sample i.

    Attributes:
        shards: absolute paths.
        shard_bytes: their sizes.
        keys: [N] strings, the members' common name.
        shard: int32 [N], index into `shards`.
        image_offset, image_length: int64 [N], where in the shard the encoded image is, in bytes.
        label: int64 [N], -1 where there is none.
        classes: names by class number.
        content_hash: SHA-256 of names, sizes, positions and labels (not of the pixels).
        quarantined: "file: member at offset N: why" of everything in the shards that is not among the samples.
    """

    shards: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    keys: NDArray[Any]
    shard: NDArray[np.int32]
    image_offset: NDArray[np.int64]
    image_length: NDArray[np.int64]
    label: NDArray[np.int64]
    classes: list[str]
    content_hash: str
    quarantined: list[str]

    def __post_init__(self) -> None:
        for item in fields(self):
            if isinstance(column := getattr(self, item.name), np.ndarray):
                column.setflags(write=False)

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def where(self, row: int) -> str:
        """`file: member at offset N` of a sample."""
        name = Path(self.shards[self.shard[row]]).name
        return f"{name}: {self.keys[row]} at offset {self.image_offset[row]}"

    def take(self, rows: NDArray[np.int64]) -> Manifest:
        """These rows, in this order, as a manifest of their own."""
        columns = {name: getattr(self, name)[rows] for name in ("keys", *_COLUMNS)}
        digest = hashlib.sha256(self.content_hash.encode() + np.asarray(rows, "<i8").tobytes())
        return replace(self, **columns, content_hash=digest.hexdigest())

    def rows_per_class(self, per_class: int, seed: int) -> NDArray[np.int64]:
        """Rows of `per_class` samples of each class, drawn by `seed`, in the order of the set.

        Raises:
            DataError: a class has fewer.
        """
        # Raw Philox words, not a Generator's methods: only the words are promised to stay the same between versions.
        drawn = np.argsort(np.random.Philox(key=seed).random_raw(len(self)), kind="stable")
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

    def write(self, path: Path) -> None:
        """Replaces `path` atomically; shards below its folder are stored relative to it, so that both can move."""
        folder = str(path.absolute().parent) + os.sep
        facts = {
            "format": FORMAT,
            "shards": [shard.removeprefix(folder) for shard in self.shards],
            "shard_bytes": self.shard_bytes,
            "classes": self.classes,
            "content_hash": self.content_hash,
            "quarantined": self.quarantined,
        }
        columns = {"key": pa.array(self.keys.tolist(), pa.string())} | {name: getattr(self, name) for name in _COLUMNS}
        table = pa.table(columns).replace_schema_metadata({"manta": json.dumps(facts)})
        encoding = dict.fromkeys(_COLUMNS, "DELTA_BINARY_PACKED") | {"key": "DELTA_BYTE_ARRAY"}
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(table, scratch, compression="zstd", use_dictionary=False, column_encoding=encoding)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads what `write` wrote.

        Raises:
            DataError: it is no manifest of this format.
        """
        facts = _read_facts(path)
        try:
            table = pq.ParquetFile(path).read()  # `read_table` and `to_numpy` import pandas: 0.3 s
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"got {path}, which cannot be read ({error}), expected a manifest; {REBUILD}") from error
        return cls(
            keys=np.array(table["key"].to_pylist(), np.dtypes.StringDType()),
            **{name: np.from_dlpack(table[name].combine_chunks()).astype(dtype) for name, dtype in _COLUMNS.items()},
            **facts,
        )


def _read_facts(path: Path) -> dict[str, Any]:
    """The metadata of a manifest; costs a few ms whatever its number of rows."""
    try:
        facts: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"manta"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"got {path}, which cannot be read ({error}), expected a manifest; {REBUILD}") from error
    if (got := facts.pop("format")) != FORMAT:
        raise DataError(f"got {path} of format {got}, expected {FORMAT}; run `manta inspect --rebuild` on its shards")
    facts["shards"] = tuple(str(path.absolute().parent / shard) for shard in facts["shards"])
    facts["shard_bytes"] = tuple(facts["shard_bytes"])
    return facts


def build_manifest(shards: str | list[str], on_shard: Callable[[str], None] = lambda _: None) -> Manifest:
    """Scans the headers of all shards; `on_shard` is called with each path when it is done.

    Raises:
        DataError: a shard cannot be read, or there is no image in any of them.
    """
    paths = expand(shards)
    classes = read_classes(Path(paths[0]).parent)
    scans: list[Scan] = []
    sizes: list[int] = []
    for path in paths:
        try:
            sizes.append(Path(path).stat().st_size)
            scans.append(scan(Path(path), None if classes is None else len(classes)))
        except OSError as error:
            raise DataError(f"got {path}, which cannot be read ({error}), expected a tar shard") from error
        on_shard(path)
    quarantined = [f"{Path(path).name}: {line}" for path, s in zip(paths, scans, strict=True) for line in s.quarantined]
    labels = np.array([label for s in scans for label in s.labels], np.int64)
    if not len(labels):
        raise DataError(
            f"got no usable sample in {len(paths)} shard(s) ({paths[0]} ...), expected images "
            f"({', '.join(IMAGE_SUFFIXES)}): {some(quarantined) or 'the shards are empty'}"
        )
    columns: dict[str, Any] = {
        "shard": np.repeat(np.arange(len(paths), dtype=np.int32), [len(s.keys) for s in scans]),
        "image_offset": np.array([offset for s in scans for offset in s.offsets], np.int64),
        "image_length": np.array([length for s in scans for length in s.lengths], np.int64),
        "label": labels,
    }
    keys = [key for s in scans for key in s.keys]
    digest = hashlib.sha256(json.dumps([[Path(path).name for path in paths], sizes, classes]).encode())
    digest.update("\0".join(keys).encode())
    for column in columns.values():
        digest.update(column.tobytes())
    return Manifest(
        shards=tuple(paths),
        shard_bytes=tuple(sizes),
        keys=np.array(keys, np.dtypes.StringDType()),
        classes=[str(number) for number in range(labels.max() + 1)] if classes is None else classes,
        content_hash=digest.hexdigest(),
        quarantined=quarantined,
        **columns,
    )


def _places(paths: list[str]) -> list[Path]:
    """Where the manifest of these shards may be: beside the first one, and in the user's cache."""
    folder = Path(paths[0]).parent
    stem = re.sub(r"[-_.]?\d*$", "", Path(paths[0]).name.removesuffix(".tar")) or "shards"

    def name(parts: Iterable[str]) -> str:
        return f"{stem}.{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:8]}.manifest.parquet"

    beside = folder / name(path.removeprefix(f"{folder}{os.sep}") for path in paths)
    return [beside, platformdirs.user_cache_path("manta") / "manifests" / name(paths)]


def _expect_match(place: Path, facts: dict[str, Any], paths: list[str]) -> None:
    if facts["shards"] != tuple(paths):
        got, expected = set(paths) - set(facts["shards"]), set(facts["shards"]) - set(paths)
        raise DataError(
            f"got shards that are not those of {place}: got {some(sorted(got)) or 'another order'}, "
            f"expected {some(sorted(expected)) or 'that of the manifest'}; {REBUILD}"
        )
    for path, expected_bytes in zip(paths, facts["shard_bytes"], strict=True):
        if (got_bytes := Path(path).stat().st_size) != expected_bytes:
            raise DataError(f"got {path} of {got_bytes} bytes, expected {expected_bytes} by {place}; {REBUILD}")
    classes = read_classes(Path(paths[0]).parent)
    if classes is not None and classes != facts["classes"]:
        raise DataError(f"got a classes.txt beside {paths[0]} that is not the one of {place}; {REBUILD}")


def _find(paths: list[str]) -> Path | None:
    """The manifest of these shards, checked against them; the newest where there are two."""
    existing = [place for place in _places(paths) if place.is_file()]
    if not existing:
        return None
    place = max(existing, key=lambda path: path.stat().st_mtime_ns)
    _expect_match(place, _read_facts(place), paths)
    return place


def open_manifest(
    shards: str | list[str], *, rebuild: bool = False, on_shard: Callable[[str], None] = lambda _: None
) -> Manifest:
    """The kept manifest of these shards; builds and keeps it where there is none.

    It is kept beside the shards, or in the user's cache folder where theirs is read-only.

    Args:
        shards: what `expand` takes.
        rebuild: scan the shards again, whatever is kept.
        on_shard: told each path as it is scanned, for progress.

    Raises:
        DataError: a shard is missing, differs from the manifest, or none holds an image.
    """
    paths = expand(shards)
    place = None if rebuild else _find(paths)
    if place is not None:
        return Manifest.read(place)
    manifest = build_manifest(paths, on_shard)
    _keep(manifest, *_places(paths))
    return manifest


def _keep(manifest: Manifest, beside: Path, cached: Path) -> None:
    if beside.parent.stat().st_mode & 0o222:  # root may write everywhere, yet read-only is meant
        try:
            return manifest.write(beside)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
    cached.parent.mkdir(parents=True, exist_ok=True)
    manifest.write(cached)


def peek(shards: str | list[str]) -> None:
    """The cheap check before a job is accepted: files exist, a kept manifest matches, else some image is in sight.

    Raises:
        DataError: what is wrong.
    """
    paths = expand(shards)
    if _find(paths) is not None:
        return
    left = PEEK_MEMBERS
    for path in paths:
        try:
            found, looked = first_image(Path(path), left)
        except OSError as error:
            raise DataError(f"got {path}, which cannot be read ({error}), expected a tar shard") from error
        left -= looked
        if found:
            return
        if left <= 0:
            break
    raise DataError(f"got no image in the headers of {some(paths, 1)}, expected {', '.join(IMAGE_SUFFIXES)}")
