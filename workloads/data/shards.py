"""Which files a set of shards is, and what everything about data raises."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

MAX_SHARDS = 1_000_000


class DataError(ValueError):
    """Shards, manifests or images that cannot be used: says got, expected, what to do."""


def some(lines: Sequence[str], most: int = 5) -> str:
    """The first few of a long list, on one line."""
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")


def expand(shards: str | list[str]) -> list[str]:
    """Brace patterns, globs and paths -> absolute paths of existing files, in their order.

    Raises:
        DataError: a file is missing, a glob matches nothing, a shard is named twice.
    """
    found: dict[str, None] = {}
    for pattern in [shards] if isinstance(shards, str) else shards:
        for path in islice(_expand(pattern), MAX_SHARDS + 1):
            if path.is_dir():
                raise DataError(f"got the folder {path}, expected shards; write {path}/*.tar")
            if not path.is_file():
                raise DataError(f"got no file {path}, expected a shard there; check the path in {pattern!r}")
            if str(path) in found:
                raise DataError(f"got {path} twice, expected each shard once; remove one of the patterns that name it")
            found[str(path)] = None
    if not found or len(found) > MAX_SHARDS:
        raise DataError(f"got {len(found)} shards in {shards!r}, expected 1 to {MAX_SHARDS}; name tar files")
    return list(found)


def _absolute(path: str) -> Path:
    """Without resolving links: classes.txt is beside the link, not beside what it points to."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100


def _expand(pattern: str) -> Iterable[Path]:
    if re.match(r"[a-z0-9]+://|pipe:", pattern):
        raise DataError(f"got {pattern!r}, expected a local path; copy the shards to a disk that every worker sees")
    if any(abs(int(a) - int(b)) > MAX_SHARDS for a, b in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)):
        raise DataError(f"got more than {MAX_SHARDS} shards in {pattern!r}, expected fewer; check the range")
    if Path(pattern).expanduser().exists():  # a name may hold braces and brackets
        yield _absolute(pattern)
        return
    try:
        parts = braceexpand(pattern)
    except ValueError as error:
        raise DataError(f"got the pattern {pattern!r} ({error}), expected balanced braces like {{000..009}}") from error
    for part in parts:
        path = _absolute(part)
        if not re.search(r"[*?\[]", part):
            yield path
            continue
        matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not matches:
            raise DataError(f"got no file that matches {part!r}, expected shards there; check the path")
        yield from matches


def read_classes(folder: Path) -> list[str] | None:
    """Class names by number from `classes.txt`, None where there is none.

    Raises:
        DataError: a name stands there twice, or the file is not text.
    """
    path = folder / "classes.txt"
    try:
        names = path.read_text("utf-8").strip().splitlines()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"got {path} ({error}), expected one class name a line in UTF-8") from error
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise DataError(f"got {some(sorted(twice))} twice in {path}, expected each class once; rename one")
    return [name.strip() for name in names]
