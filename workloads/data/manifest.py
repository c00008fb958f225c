"""The manifest of a set of shards: made once, kept beside them or in the user's cache, checked when it is opened.

With it a reader knows every sample by its number, whatever the number of shards.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import platformdirs

from workloads.data.columns import REBUILD, Manifest, read_facts
from workloads.data.indexing import MIN_PARALLEL_BYTES, Mapper, build_manifest, here
from workloads.data.shards import DataError, expand, read_classes, some, unreadable
from workloads.data.sources import is_remote, read_file, sizes, write_file
from workloads.data.tarscan import PRIMARY, first_sample

__all__ = ["DataError", "Manifest", "build_manifest", "count", "expand", "open_manifest", "peek"]

logger = logging.getLogger(__name__)

PEEK_MEMBERS = 10_000  # headers that `peek` looks at before it gives up


def open_manifest(
    shards: str | list[str],
    *,
    rebuild: bool = False,
    on_shard: Callable[[str], None] = lambda _: None,
    mapper: Mapper = here,
) -> Manifest:
    """The kept manifest of these shards; builds and keeps it where there is none.

    It is kept beside the shards, or in the user's cache folder where theirs takes no files.

    Args:
        shards: what `expand` takes.
        rebuild: scan the shards again, whatever is kept.
        on_shard: told each path as it is scanned, for progress.
        mapper: where the scans run.

    Raises:
        DataError: a shard is missing, differs from the manifest, or none holds a sample.
    """
    paths = expand(shards)
    place = None if rebuild else _find(paths)
    if place is not None:
        return Manifest.read(place)
    manifest = build_manifest(paths, on_shard, mapper)
    beside, cached = _places(paths)
    _keep(manifest, beside, cached)
    return manifest


def count(shards: str | list[str]) -> Manifest | None:
    """The manifest without keeping one: the kept one, or that of small shards of this machine.

    None for shards whose scan would take long.

    Raises:
        DataError: as `open_manifest`.
    """
    paths = expand(shards)
    if (place := _find(paths)) is not None:
        return Manifest.read(place)
    if any(map(is_remote, paths)) or sum(sizes(paths)) > MIN_PARALLEL_BYTES:
        return None
    return build_manifest(paths)


def peek(shards: str | list[str]) -> None:
    """The cheap check before a job is accepted: files exist, a kept manifest matches, else some sample is in sight.

    Raises:
        DataError: what is wrong.
    """
    paths = expand(shards)
    if _find(paths) is not None:
        return
    left = PEEK_MEMBERS
    for path in paths:
        try:
            found, looked = first_sample(path, left)
        except OSError as error:
            raise unreadable(path, error, "a tar shard") from error
        left -= looked
        if found:
            return
        if left <= 0:
            break
    raise DataError(f"got no sample in the headers of {some(paths, 1)}, expected one of: {', '.join(PRIMARY)}")


def _places(paths: list[str]) -> tuple[str, Path]:
    """Where the manifest of these shards may be: beside the first one, and in the user's cache."""
    folder, first = paths[0].rsplit("/", 1)
    stem = re.sub(r"[-_.]?\d*$", "", first.removesuffix(".tar")) or "shards"

    def name(parts: Iterable[str]) -> str:
        return f"{stem}.{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:8]}.manifest.parquet"

    beside = f"{folder}/{name(path.removeprefix(f'{folder}/') for path in paths)}"
    return beside, platformdirs.user_cache_path("manta") / "manifests" / name(paths)


def _find(paths: list[str]) -> Path | None:
    """The manifest of these shards, checked against them; the newest where there are two.

    One that another version of this program wrote, or of shards at another place, is as good as none.
    """
    beside, cached = _places(paths)
    if is_remote(beside) and not cached.is_file():
        try:
            if (data := read_file(beside)) is not None:
                _replace(cached, data)
        except OSError as error:
            raise unreadable(beside, error, "a manifest or no such file") from error
    places = [cached] if is_remote(beside) else [Path(beside), cached]
    existing = [place for place in places if place.is_file()]
    if not existing:
        return None
    place = max(existing, key=lambda path: path.stat().st_mtime_ns)
    facts = read_facts(place)
    if facts is None:
        logger.info("%s was written by another version; the shards are scanned again", place)
        return None
    if facts["shards"] != tuple(paths):  # shards and manifest were copied together, between a disk and a bucket
        logger.info("%s is of the same names at another place; the shards are scanned again", place)
        return None
    _expect_match(place, facts, paths)
    return place


def _expect_match(place: Path, facts: dict[str, Any], paths: list[str]) -> None:
    try:
        now = sizes(paths)
    except OSError as error:
        raise unreadable(some(paths, 1), error, f"the shards of {place}") from error
    for path, got_bytes, expected_bytes in zip(paths, now, facts["shard_bytes"], strict=True):
        if got_bytes != expected_bytes:
            raise DataError(f"got {path} of {got_bytes} bytes, expected {expected_bytes} by {place}; {REBUILD}")
    classes = read_classes(paths[0])
    if classes is not None and classes != facts["classes"]:
        raise DataError(f"got a classes.txt beside {paths[0]} that is not the one of {place}; {REBUILD}")


def _keep(manifest: Manifest, beside: str, cached: Path) -> None:
    if not is_remote(beside):
        if Path(beside).parent.stat().st_mode & 0o222:  # root may write everywhere, yet read-only is meant
            try:
                return manifest.write(Path(beside))
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
        cached.parent.mkdir(parents=True, exist_ok=True)
        return manifest.write(cached)
    cached.parent.mkdir(parents=True, exist_ok=True)
    manifest.write(cached)
    try:
        write_file(beside, cached.read_bytes())
    except OSError as error:
        logger.info("the manifest is kept in %s only: %s takes no files (%s)", cached, beside, error)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_bytes(data)
    scratch.replace(path)
