"""Hugging Face's ImageFolder: split folders with class folders, or with a metadata table beside the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workloads.data.pack import SAMPLES_PER_SHARD, image_source, pack_folder, read_csv
from workloads.data.pack_files import class_member, has_label, inside, mixed, order_classes, split_folders, text_member
from workloads.data.shard_writer import (
    Members,
    OnSample,
    Packed,
    SampleError,
    ShardLimit,
    Source,
    nobody,
    write_dataset,
)
from workloads.data.shards import DataError
from workloads.data.unfinished import fingerprint

TABLES = ("metadata.csv", "metadata.jsonl")
LABEL = "label"
CAPTIONS = ("text", "caption")

Row = dict[str, Any]


def pack_hf(
    root: Path,
    out: Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    force: bool = False,
    on_sample: OnSample = nobody,
) -> Packed:
    """A folder as Hugging Face's ImageFolder reads it.

    Sub-folders called train, val, test or the like are splits. A `metadata.csv` or `metadata.jsonl` in each split, or
    one in `root` for all, names the images in its column `file_name`. Its column `label` becomes the class (values in
    their order), `text` or `caption` the caption (txt), all others go into one JSON member. Without any table,
    sub-folders are classes, as in `pack_folder`.

    Args:
        root: the folder.
        out: the new folder.
        samples_per_shard: at most.
        force: replace `out`, if it holds nothing but packed shards.
        on_sample: told the name of each image when it is done.

    Raises:
        DataError: a table cannot be read, some splits have one and others not, or an `out` that may not be replaced.
    """
    parts = split_folders(root)
    tables = {split: table for split, folder in parts.items() if (table := _find_table(folder))}
    whole = None if tables else _find_table(root)
    if not tables and not whole:
        return pack_folder(root, out, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample)
    if whole is None and len(tables) < len(parts):
        missing = ", ".join(sorted(parts.keys() - tables.keys()))
        raise DataError(f"got a metadata table in {', '.join(tables)}, none in {missing}, expected one in each; add it")
    rows = {split: _read_table(table) for split, table in tables.items()}
    if whole is not None:
        named = _read_table(whole)
        rows = {split: [row for row in named if row["file_name"].startswith(f"{split}/")] for split in parts}
        parts = dict.fromkeys(parts, root)
    classes = order_classes({str(row[LABEL]) for table in rows.values() for row in table if has_label(row.get(LABEL))})
    numbers = {name: number for number, name in enumerate(classes)}
    bad: list[str] = []
    sources: dict[str, list[Source]] = {split: [] for split in rows}
    paths: list[Path] = []
    for split, rows_of_split in rows.items():
        for row in rows_of_split:
            try:
                path = inside(parts[split], row["file_name"])
            except SampleError as error:
                bad.append(f"{split}: {error}")
                continue
            paths.append(path)
            sources[split].append(image_source(path, root, _beside(row, numbers)))
    return write_dataset(
        {split: mixed(of_split) for split, of_split in sources.items()},
        classes,
        out,
        limit=ShardLimit(samples=samples_per_shard),
        arguments={
            "command": "pack hf",
            "root": str(root.absolute()),
            "samples_per_shard": samples_per_shard,
            "files": fingerprint([*tables.values(), *filter(None, [whole]), *paths]),
        },
        force=force,
        on_sample=on_sample,
        bad=bad,
    )


def _find_table(folder: Path) -> Path | None:
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def _read_table(table: Path) -> list[Row]:
    """Rows that name a file.

    Raises:
        DataError: the table cannot be read, or a row names none.
    """
    rows: list[Row]
    if table.suffix == ".csv":
        rows = list(read_csv(table)[1])
    else:
        try:
            rows = [json.loads(line) for line in table.read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"got {table}, which cannot be read ({error}), expected one JSON object a line") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise DataError(f"got no file_name in row {number} of {table}, expected the path of an image; add it")
    return rows


def _beside(row: Row, numbers: dict[str, int]) -> Members:
    """The members that the columns of a row become."""
    label = row.get(LABEL)
    members = dict(class_member(numbers[str(label)] if has_label(label) else None))
    caption = next((name for name in CAPTIONS if row.get(name)), None)
    if caption is not None:
        members["txt"] = text_member(row[caption])
    used = ("file_name", LABEL, caption)
    others = {name: value for name, value in row.items() if name not in used and value is not None}
    if others:
        members["json"] = json.dumps(others, ensure_ascii=False, sort_keys=True).encode()
    return members
