"""Samples -> WebDataset shards with their manifest, all or nothing.

Bytes of images are copied as they are; each is decoded once to be sure that it can be. The same input gives the same
shards byte for byte: owner, mode and times are fixed, samples are put in an order drawn by a fixed seed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from workloads.data.decode import ImageError, decode
from workloads.data.manifest import open_manifest
from workloads.data.shards import DataError, some
from workloads.data.tarscan import IMAGE_SUFFIXES

_OURS = re.compile(r".*\.tar|.*\.manifest\.parquet|classes\.txt")

OnSample = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """One image on its way into a shard; `name` is for messages, `stem` for the key."""

    name: str
    stem: str
    suffix: str
    read: Callable[[], bytes]
    label: int | None = None


@dataclass
class Packed:
    """What was written.

    Attributes:
        out: the folder.
        classes: names by class number, [] where there are no labels.
        samples: number by split.
        shards: file names by split.
        bad: "file: why" of images that were left out.
    """

    out: Path
    classes: list[str]
    samples: dict[str, int] = field(default_factory=dict)
    shards: dict[str, list[str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)


def nobody(name: str) -> None:
    """Nobody watches the progress."""


def write_dataset(
    splits: dict[str, list[Source]],
    classes: list[str],
    out: Path,
    *,
    samples_per_shard: int,
    force: bool,
    on_sample: OnSample,
    bad: Sequence[str] = (),
) -> Packed:
    """Writes `<split>-000000.tar`, ..., classes.txt and manifests into a new folder `out`.

    Args:
        splits: images by split; each split is put in an order of its own.
        classes: names by class number.
        out: the folder, made only when everything is written.
        samples_per_shard: at most.
        force: replace `out`, if it holds nothing but packed shards.
        on_sample: told the name of each image when it is done.
        bad: "file: why" of what was left out before.

    Raises:
        DataError: no image can be used, or `out` may not be replaced.
    """
    if samples_per_shard < 1:
        raise DataError(f"got samples_per_shard={samples_per_shard}, expected 1 or more")
    packed = Packed(out, classes, bad=list(bad))
    with _replacing(out, force) as folder:
        if classes:
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        for split, sources in splits.items():
            shuffled = [sources[i] for i in np.argsort(np.random.Philox(key=0).random_raw(len(sources)), kind="stable")]
            samples = _samples(shuffled, packed.bad, on_sample)
            shards, count = _write_shards(samples, folder, split, samples_per_shard)
            if count:
                packed.shards[split], packed.samples[split] = shards, count
                open_manifest([str(folder / shard) for shard in shards])
        if not packed.samples:
            raise DataError(
                f"got no image that can be packed, expected files with {', '.join(IMAGE_SUFFIXES)}; "
                f"{some(packed.bad) or 'check the folder'}"
            )
    return packed


def _samples(sources: Iterable[Source], bad: list[str], on_sample: OnSample) -> Iterator[dict[str, str | bytes]]:
    """WebDataset samples of what can be decoded; the rest goes to `bad`."""
    number = 0
    for source in sources:
        try:
            data = source.read()
            decode(data)
        except (OSError, ImageError) as error:
            bad.append(f"{source.name}: {error}")
        else:
            # Stems repeat between folders and may hold dots, where a key would end.
            stem = re.sub(r"[^A-Za-z0-9_-]+", "_", source.stem)[:64]
            sample: dict[str, str | bytes] = {"__key__": f"{number:08d}_{stem}", source.suffix: data}
            yield sample | ({} if source.label is None else {"cls": str(source.label).encode()})
            number += 1
        on_sample(source.name)


def _write_shards(
    samples: Iterator[dict[str, str | bytes]], folder: Path, split: str, per_shard: int
) -> tuple[list[str], int]:
    """(file names, number of samples)."""
    from webdataset.writer import TarWriter

    names: list[str] = []
    count = 0
    sample = next(samples, None)
    while sample is not None:
        names.append(f"{split}-{len(names):06d}.tar")
        with open(folder / names[-1], "wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for _ in range(per_shard):
                tar.write(sample)
                count += 1
                sample = next(samples, None)
                if sample is None:
                    break
    return names, count


@contextmanager
def _replacing(out: Path, force: bool) -> Iterator[Path]:
    """A scratch folder beside `out` that becomes `out` when the block ends well, and goes away when it does not."""
    out = out.absolute()
    existing = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if existing and not force:
        raise DataError(
            f"got {out}, which is not empty, expected a new folder; give another one, or --force to replace it"
        )
    foreign = [name for name in existing if not _OURS.fullmatch(name)]
    if foreign or out.is_file():
        raise DataError(
            f"got {out}, which holds {some(foreign) or 'a file'}, expected packed shards alone; give another folder"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        scratch.mkdir()
        yield scratch
        if existing:
            out.rename(old)
        scratch.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
