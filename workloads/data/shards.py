"""Which files a set of shards is, and what everything about data raises."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from workloads.data import sources
from workloads.data.sources import Unsupported, is_remote, list_folder, read_file

MAX_SHARDS = 1_000_000


class DataError(ValueError):
    """Shards, manifests or images that cannot be used: says got, expected, what to do."""


class Unreachable(DataError):
    """Data whose store does not answer: the same may be usable later."""


def unreadable(path: str, error: OSError, expected: str) -> DataError:
    """What `error` means for who named `path`, where `expected` should be."""
    if isinstance(error, sources.Unreachable):
        return Unreachable(f"got no answer for {path} ({error}), expected {expected}; try again, or check the address")
    if isinstance(error, Unsupported):
        todo = "install what it takes where the service and its workers run, or name another place"
    else:
        todo = "check the path, and who may read and list it"
    return DataError(f"got {path}, which cannot be read ({error}), expected {expected}; {todo}")


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
            if not is_remote(path):
                _expect_file(Path(path), pattern)
            if path in found:
                raise DataError(f"got {path} twice, expected each shard once; remove one of the patterns that name it")
            found[path] = None
    if not found or len(found) > MAX_SHARDS:
        raise DataError(f"got {len(found)} shards in {shards!r}, expected 1 to {MAX_SHARDS}; name tar files")
    return list(found)


def _expect_file(path: Path, pattern: str) -> None:
    if path.is_dir():
        raise DataError(f"got the folder {path}, expected shards; write {path}/*.tar")
    if not path.is_file():
        raise DataError(f"got no file {path}, expected a shard there; check the path in {pattern!r}")


def _absolute(path: str) -> Path:
    """Without resolving links: classes.txt is beside the link, not beside what it points to."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100


def _expand(pattern: str) -> Iterable[str]:
    if pattern.startswith("pipe:"):
        raise DataError(f"got {pattern!r}, whose samples cannot be indexed, expected files; use it as a stream alone")
    if any(abs(int(a) - int(b)) > MAX_SHARDS for a, b in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)):
        raise DataError(f"got more than {MAX_SHARDS} shards in {pattern!r}, expected fewer; check the range")
    if not is_remote(pattern) and Path(pattern).expanduser().exists():  # a name may hold braces and brackets
        yield str(_absolute(pattern))
        return
    try:
        parts = braceexpand(pattern)
    except ValueError as error:
        raise DataError(f"got the pattern {pattern!r} ({error}), expected balanced braces like {{000..009}}") from error
    for part in parts:
        if not re.search(r"[*?\[]", part):
            yield part if is_remote(part) else str(_absolute(part))
            continue
        matches = _remote_glob(part) if is_remote(part) else _glob(_absolute(part))
        if not matches:
            raise DataError(f"got no file that matches {part!r}, expected shards there; check the path")
        yield from matches


def _glob(path: Path) -> list[str]:
    return [str(match) for match in sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))]


def _remote_glob(url: str) -> list[str]:
    folder, name = url.rsplit("/", 1)
    if re.search(r"[*?\[]", folder):
        raise DataError(f"got {url!r}, expected * in the name of a file only; name the folders")
    try:
        return [path for path in list_folder(folder) if fnmatch.fnmatch(path.rsplit("/", 1)[-1], name)]
    except OSError as error:
        raise unreadable(folder, error, "a folder that can be listed") from error


def read_classes(shard: str) -> list[str] | None:
    """Class names by number from the `classes.txt` beside a shard, None where there is none.

    Raises:
        DataError: a name stands there twice, or the file is not text.
    """
    path = f"{shard.rsplit('/', 1)[0]}/classes.txt"
    try:
        data = read_file(path)
        names = None if data is None else data.decode("utf-8").strip().splitlines()
    except OSError as error:
        raise unreadable(path, error, "class names or no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"got {path} ({error}), expected one class name a line in UTF-8") from error
    if names is None:
        return None
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise DataError(f"got {some(sorted(twice))} twice in {path}, expected each class once; rename one")
    return [name.strip() for name in names]
