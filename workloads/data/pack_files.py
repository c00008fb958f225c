"""Files of a folder as sources of samples: which split and class each belongs to, its key, its members."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from workloads.data.order import permutation
from workloads.data.shard_writer import (
    Members,
    OnSample,
    Packed,
    SampleError,
    ShardLimit,
    Source,
    Split,
    write_dataset,
)
from workloads.data.shards import DataError
from workloads.data.unfinished import fingerprint

SPLITS = ("train", "val", "valid", "validation", "test")

_MAGIC = (  # how the formats begin that `decode` reads
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
    (b"BM", "bmp"),
    (b"GIF8", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P", "ppm"),
)


@dataclass(frozen=True)
class Found:
    """Files of a folder: (path, class number) by split, and the names of the classes."""

    splits: dict[str, list[tuple[Path, int | None]]]
    classes: list[str]

    @property
    def paths(self) -> list[Path]:
        return [path for files in self.splits.values() for path, _ in files]


def folders(root: Path) -> list[Path]:
    """The folders in it that are not hidden, by name."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def split_folders(root: Path) -> dict[str, Path]:
    """`root` itself as train, or its folders if all are called train, val, test or the like.

    Raises:
        DataError: there is no such folder.
    """
    if not root.is_dir():
        raise DataError(f"got no folder {root}, expected one to pack; check the path")
    splits = {folder.name: folder for folder in folders(root)}
    return splits if splits and splits.keys() <= set(SPLITS) else {"train": root}


def find_files(root: Path, suffixes: Sequence[str], not_classes: Callable[[str], bool] = lambda _: False) -> Found:
    """Files by split and class: sub-folders are classes (numbered by name), or splits that hold class folders.

    Args:
        root: is searched to any depth below a class.
        suffixes: of the files that are wanted, in small letters, without the first dot.
        not_classes: says of a folder's name that it is no class; what is in it has no label.

    Raises:
        DataError: there is no such folder, or files lie beside class folders.
    """
    parts = split_folders(root)
    classes = sorted({path.name for part in parts.values() for path in folders(part) if not not_classes(path.name)})
    splits: dict[str, list[tuple[Path, int | None]]] = {}
    for split, part in parts.items():
        loose = _files(part, suffixes)
        for folder in folders(part):
            loose += _files(folder, suffixes, deep=True) if not_classes(folder.name) else []
        if loose and classes:
            raise DataError(
                f"got {len(loose)} files beside class folders in {part} ({loose[0].name} ...), expected only "
                "folders there; move them into a class"
            )
        splits[split] = [(path, None) for path in loose]
        for number, name in enumerate(classes):
            splits[split] += [(path, number) for path in _files(part / name, suffixes, deep=True)]
    return Found(splits, classes)


def _files(folder: Path, suffixes: Sequence[str], *, deep: bool = False) -> list[Path]:
    if not folder.is_dir():  # a split need not have every class
        return []
    return sorted(
        path
        for path in (folder.rglob("*") if deep else folder.iterdir())
        if stem_and_suffix(path, suffixes)[1] and not path.name.startswith(".") and path.is_file()
    )


def stem_and_suffix(path: Path, suffixes: Sequence[str]) -> tuple[str, str]:
    """`a/b.seg.nii.gz` -> ("b.seg", "nii.gz"); the suffix is "" where it is none of these."""
    lower = path.name.lower()
    suffix = next((suffix for suffix in suffixes if lower.endswith(f".{suffix}")), "")
    return (path.name[: -len(suffix) - 1], suffix) if suffix else (path.name, "")


def order_classes(names: Collection[str]) -> list[str]:
    """Class names by number: in the order of numbers if all of them are, else of letters."""
    numeric = all(re.fullmatch(r"\d+", name) for name in names)
    return sorted(set(names), key=(lambda name: (int(name), name)) if numeric else None)


def has_label(value: object) -> bool:
    """Whether a cell of a label column says something: it may be empty, or -1 as in Hugging Face's test sets."""
    return value is not None and value != "" and not (isinstance(value, int) and value < 0)


def class_member(label: int | None) -> dict[str, bytes]:
    return {} if label is None else {"cls": str(label).encode()}


def text_member(caption: object) -> bytes:
    """A caption as UTF-8; a list of them becomes a line each."""
    if not isinstance(caption, list):
        return str(caption).encode()
    return "\n".join(" ".join(str(line).split()) for line in caption).encode()


def image_suffix(data: bytes) -> str:
    """The suffix for an image whose name has none that is known.

    Raises:
        SampleError: it is no image.
    """
    suffix = next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), None)
    if suffix is None:
        raise SampleError(f"got {len(data)} bytes that start with {data[:8]!r}, expected an image")
    return suffix


def key_part(stem: str) -> str:
    """What may stand in a key of it: stems hold dots, where a key would end, and slashes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:64]


def numbered(stem: str) -> Callable[[int], str]:
    """The key of a sample by its number: stems repeat between folders."""
    return lambda number: f"{number:08d}_{key_part(stem)}"


def inside(folder: Path, name: str) -> Path:
    """A path that a table names, which must not leave the folder of the table.

    Raises:
        SampleError: it does.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SampleError(f"got the path {name!r}, which climbs out of {folder}, expected one inside")
    return folder / name


def checked(check: Callable[[bytes], object], others: Members) -> Callable[[bytes], Members]:
    """For `file_source`: members that do not depend on the content, if it passes the check."""

    def beside(data: bytes) -> Members:
        check(data)
        return others

    return beside


def file_source(
    path: Path,
    root: Path,
    suffixes: Sequence[str],
    beside: Callable[[bytes], Members],
) -> Source:
    """A file as a sample.

    Args:
        path: of the file.
        root: its name in messages is relative to it.
        suffixes: one of them becomes that of the member; a name with another is taken for an image's.
        beside: the other members; raises ImageError or SampleError if the content cannot be used.
    """
    stem, suffix = stem_and_suffix(path, suffixes)

    def read() -> Members:
        data = path.read_bytes()
        others = beside(data)
        return {suffix or image_suffix(data): data, **others}

    name = path.relative_to(root) if path.is_relative_to(root) else path
    return Source(str(name), numbered(stem if suffix else path.stem), read)


def mixed(sources: Sequence[Source]) -> Split:
    """In an order drawn by a fixed seed, since files come sorted by class."""
    return Split.of([sources[i] for i in permutation(0, 0, 0, len(sources))])


def write_found(
    command: str,
    root: Path,
    found: Found,
    source: Callable[[Path, int | None], Source | None],
    out: Path,
    *,
    samples_per_shard: int,
    force: bool,
    on_sample: OnSample,
) -> Packed:
    """Writes the files of a folder as shards.

    Args:
        command: the one that asks for it; another one does not go on with its work.
        root: the folder.
        found: its files.
        source: a file and its class as a sample; None where it belongs to another one.
        out: the new folder.
        samples_per_shard: at most.
        force: replace `out`, if it holds nothing but packed shards.
        on_sample: told the name of each file when it is done.

    Raises:
        DataError: no file, or an `out` that may not be replaced.
    """
    return write_dataset(
        {
            split: mixed([sample for path, label in files if (sample := source(path, label)) is not None])
            for split, files in found.splits.items()
        },
        found.classes,
        out,
        limit=ShardLimit(samples=samples_per_shard),
        arguments={
            "command": command,
            "root": str(root.absolute()),
            "samples_per_shard": samples_per_shard,
            "files": fingerprint(found.paths),
        },
        force=force,
        on_sample=on_sample,
    )
