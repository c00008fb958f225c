"""Where images come from that are packed: scikit-learn's digits, a folder, a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from workloads.data.decode import decode
from workloads.data.pack_files import (
    checked,
    class_member,
    file_source,
    find_files,
    mixed,
    numbered,
    order_classes,
    write_found,
)
from workloads.data.shard_writer import Members, OnSample, Packed, ShardLimit, Source, nobody, write_dataset
from workloads.data.shards import DataError
from workloads.data.tarscan import IMAGE_SUFFIXES
from workloads.data.unfinished import fingerprint

SAMPLES_PER_SHARD = 1000


def pack_digits(out: Path, *, force: bool = False) -> Packed:
    """The 1,797 handwritten digits of scikit-learn, 8x8 made 32x32 bicubically: train 1,437, test 360, stratified.

    Raises:
        DataError: `out` is there and not empty, and `force` is not given.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=360, random_state=0, stratify=digits.target)

    def source(row: int) -> Source:
        def read() -> Members:
            grey = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
            return {"png": file.getvalue(), **class_member(int(digits.target[row]))}

        return Source(f"digit {row}", numbered(f"digit{row:04d}"), read)

    splits = {"train": [source(row) for row in train], "test": [source(row) for row in test]}
    return write_dataset(
        {name: mixed(sources) for name, sources in splits.items()},
        [str(number) for number in range(10)],
        out,
        limit=ShardLimit(samples=-(-len(train) // 2)),
        arguments={"command": "pack digits"},
        force=force,
        on_sample=nobody,
    )


def pack_folder(
    root: Path,
    out: Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    force: bool = False,
    on_sample: OnSample = nobody,
) -> Packed:
    """A folder of images. Sub-folders are classes (numbered by name); without any there are no labels.

    Sub-folders that are all called train, val, test or the like are splits, each with its own class folders.

    Args:
        root: is searched to any depth below a class; files that are no images by their name are left alone.
        out: the new folder.
        samples_per_shard: at most.
        force: replace `out`, if it holds nothing but packed shards.
        on_sample: told the name of each image when it is done.

    Raises:
        DataError: no image, images beside class folders, or an `out` that may not be replaced.
    """
    return write_found(
        "pack folder",
        root,
        find_files(root, IMAGE_SUFFIXES),
        lambda path, label: image_source(path, root, class_member(label)),
        out,
        samples_per_shard=samples_per_shard,
        force=force,
        on_sample=on_sample,
    )


def pack_csv(
    table: Path,
    out: Path,
    *,
    image_column: str = "image",
    label_column: str | None = "label",
    root: Path | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    force: bool = False,
    on_sample: OnSample = nobody,
) -> Packed:
    """A CSV file with a header, a row for each image; classes are the values of the label column in their order.

    Args:
        table: the CSV file, UTF-8.
        out: the new folder.
        image_column: holds paths of images.
        label_column: holds class names or numbers; None for no labels.
        root: where relative paths start; the folder of the CSV file by default.
        samples_per_shard: at most.
        force: replace `out`, if it holds nothing but packed shards.
        on_sample: told the name of each image when it is done.

    Raises:
        DataError: the file or a column is missing, or an `out` that may not be replaced.
    """
    header, rows = read_csv(table)
    for column in filter(None, (image_column, label_column)):
        if column not in header:
            raise DataError(
                f"got no column {column!r} in {table}, expected one of {', '.join(header)}; name another one"
            )
    classes = order_classes({row[label_column] or "" for row in rows} - {""}) if label_column else []
    numbers = {name: number for number, name in enumerate(classes)}
    folder = table.parent if root is None else root
    bad, sources, paths = [], [], []
    for line, row in enumerate(rows, 2):
        if not row[image_column]:
            bad.append(f"{table.name}: row {line}: no path of an image")
        elif label_column and not row[label_column]:
            bad.append(f"{table.name}: row {line}: no label")
        else:
            paths.append(folder / row[image_column])
            sources.append(
                image_source(paths[-1], folder, class_member(numbers[row[label_column]] if label_column else None))
            )
    return write_dataset(
        {"train": mixed(sources)},
        classes,
        out,
        limit=ShardLimit(samples=samples_per_shard),
        arguments={
            "command": "pack csv",
            "table": str(table.absolute()),
            "image_column": image_column,
            "label_column": label_column,
            "root": str(folder.absolute()),
            "samples_per_shard": samples_per_shard,
            "files": fingerprint([table, *paths]),
        },
        force=force,
        on_sample=on_sample,
        bad=bad,
    )


def read_csv(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the rows of a CSV file in UTF-8.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"got {table}, which cannot be read ({error}), expected a CSV file in UTF-8") from error


def image_source(path: Path, root: Path, beside: Mapping[str, bytes]) -> Source:
    """A file that must decode as an image, with these other members beside it."""
    return file_source(path, root, IMAGE_SUFFIXES, checked(decode, beside))
