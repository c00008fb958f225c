"""Where images come from that are packed: scikit-learn's digits, a folder, a CSV file."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np

from workloads.data.shard_writer import OnSample, Packed, Source, nobody, write_dataset
from workloads.data.shards import DataError
from workloads.data.tarscan import IMAGE_SUFFIXES

SAMPLES_PER_SHARD = 1000
SPLITS = ("train", "val", "valid", "validation", "test")


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

    def png(row: int) -> bytes:
        grey = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
        return file.getvalue()

    def source(row: int) -> Source:
        return Source(f"digit {row}", f"digit{row:04d}", "png", lambda: png(row), int(digits.target[row]))

    splits = {"train": [source(row) for row in train], "test": [source(row) for row in test]}
    classes = [str(number) for number in range(10)]
    per_shard = -(-len(train) // 2)
    return write_dataset(splits, classes, out, samples_per_shard=per_shard, force=force, on_sample=nobody)


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
    if not root.is_dir():
        raise DataError(f"got no folder {root}, expected one with images; check the path")
    parts = _folders(root)
    splits = {folder.name: folder for folder in parts}
    if not parts or not splits.keys() <= set(SPLITS):
        splits = {"train": root}
    classes = sorted({folder.name for split in splits.values() for folder in _folders(split)})
    sources: dict[str, list[Source]] = {}
    for split, folder in splits.items():
        loose = [path for path in folder.iterdir() if _is_image(path)]
        if loose and classes:
            raise DataError(
                f"got {len(loose)} images beside class folders in {folder} ({loose[0].name} ...), expected only "
                "folders there; move them into a class"
            )
        sources[split] = [_file(path, root, None) for path in sorted(loose)]
        for number, name in enumerate(classes):
            paths = sorted(path for path in (folder / name).rglob("*") if _is_image(path))
            sources[split] += [_file(path, root, number) for path in paths]
    return write_dataset(sources, classes, out, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample)


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
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"got {table}, which cannot be read ({error}), expected a CSV file in UTF-8") from error
    for column in filter(None, (image_column, label_column)):
        if column not in header:
            raise DataError(
                f"got no column {column!r} in {table}, expected one of {', '.join(header)}; name another one"
            )
    names = {row[label_column] or "" for row in rows} - {""} if label_column else set()
    numeric = all(re.fullmatch(r"\d+", name) for name in names)
    classes = sorted(names, key=(lambda name: (int(name), name)) if numeric else None)
    numbers = {name: number for number, name in enumerate(classes)}
    folder = table.parent if root is None else root
    bad, sources = [], []
    for line, row in enumerate(rows, 2):
        if not row[image_column]:
            bad.append(f"{table.name}: row {line}: no path of an image")
        elif label_column and not row[label_column]:
            bad.append(f"{table.name}: row {line}: no label")
        else:
            label = numbers[row[label_column]] if label_column else None
            sources.append(_file(folder / row[image_column], folder, label))
    return write_dataset(
        {"train": sources}, classes, out, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample, bad=bad
    )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _file(path: Path, root: Path, label: int | None) -> Source:
    name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    return Source(name, path.stem, path.suffix[1:].lower(), path.read_bytes, label)
