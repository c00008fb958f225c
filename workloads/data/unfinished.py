"""A folder of shards that is written one by one, continues after a kill, and appears whole or not at all.

Until all is written, everything is in the hidden `.NAME.partial` beside the folder: `content/`, and a journal whose
first line are the arguments and each further line one complete shard. A killed run is repeated with the same
arguments and goes on after the last complete shard; with others it is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from workloads.data.shards import DataError, some

FORMAT = 1  # of the journal, and of the bytes that the same arguments give
_OURS = re.compile(r".*\.tar|.*\.manifest\.parquet|classes\.txt")

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Complete:
    """One shard that is written: how many samples it holds, and which source is the next one after it."""

    split: str
    shard: str
    samples: int
    next_source: int
    bad: list[str]


@dataclass
class Unfinished:
    """The folder while it is being written.

    Attributes:
        folder: where files go.
        complete: shards that are written, those of a killed run included.
    """

    folder: Path
    _journal: BinaryIO
    complete: list[Complete] = field(default_factory=list)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A new file that is there under its name only when the block has ended well and its bytes are on the disk."""
        scratch = self.folder / f".{name}.tmp"
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.folder / name)

    def add(self, shard: Complete) -> None:
        """Notes that a shard is complete: it will not be written again."""
        _append(self._journal, asdict(shard))
        self.complete.append(shard)


def fingerprint(paths: Iterable[str | Path]) -> str:
    """Changes when one of the files does, by name, size and time; files that are missing count too."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = Path(path).stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        except OSError:
            digest.update(f"{path}\0missing\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextmanager
def resumable(out: Path, arguments: Arguments, *, force: bool) -> Iterator[Unfinished]:
    """What is written into it becomes `out` when the block ends well; when it does not, complete shards are kept.

    Args:
        out: the new folder.
        arguments: all that decides about the bytes, as JSON; a killed run goes on if it had the same.
        force: replace `out`, if it holds nothing but packed shards, and drop what a run with other arguments left.

    Raises:
        DataError: `out` may not be replaced, another process is writing it, or a killed run had other arguments.
    """
    out = out.absolute()
    scratch = out.with_name(f".{out.name}.partial")
    old = scratch / "old"
    _expect_replaceable(out, force)
    scratch.mkdir(parents=True, exist_ok=True)
    with open(scratch / "journal.jsonl", "a+b") as journal:
        _lock(journal, scratch)
        if old.exists() and not out.exists():  # killed between the two renames of `_swap`
            old.rename(out)
        _expect_replaceable(out, force)
        work = Unfinished(scratch / "content", journal)
        try:
            work.complete = _resume(journal, json.loads(json.dumps(arguments | {"format": FORMAT})), force, scratch)
            work.folder.mkdir(exist_ok=True)
            names = {shard.shard for shard in work.complete}
            for left_over in [path for path in work.folder.iterdir() if path.name not in names]:
                left_over.unlink()
            yield work
            _expect_replaceable(out, force)
            _swap(work.folder, out, old)
            shutil.rmtree(scratch)
        finally:
            if scratch.exists() and not _records(journal)[1:]:
                shutil.rmtree(scratch)


def _expect_replaceable(out: Path, force: bool) -> None:
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


def _lock(journal: BinaryIO, scratch: Path) -> None:
    """For as long as the file is open, so that also a kill releases it."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(journal.fileno()), Path(journal.name).stat())
    except (BlockingIOError, FileNotFoundError):  # missing: whoever held it has just finished
        ours = False
    if not ours:
        raise DataError(f"got {scratch}, which another process is writing, expected one writer; wait until it ends")


def _records(journal: BinaryIO) -> list[Any]:
    """All whole lines; what a kill cut off at the end is removed."""
    journal.seek(0)
    raw = journal.read()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        journal.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _append(journal: BinaryIO, record: Any) -> None:
    journal.write(json.dumps(record).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())


def _resume(journal: BinaryIO, arguments: Arguments, force: bool, scratch: Path) -> list[Complete]:
    records = _records(journal)
    if records[1:] and records[0] != arguments and not force:
        before = records[0]
        differ = [name for name in before.keys() | arguments.keys() if before.get(name) != arguments.get(name)]
        got, expected = (
            ", ".join(f"{name}={given.get(name)}" for name in sorted(differ)) for given in (arguments, before)
        )
        raise DataError(
            f"got {got}, expected {expected} as in the unfinished run in {scratch}; repeat that one to continue it, "
            "or --force to drop it"
        )
    if records and records[0] == arguments:
        return [Complete(**record) for record in records[1:]]
    journal.truncate(0)
    shutil.rmtree(scratch / "content", ignore_errors=True)
    _append(journal, arguments)
    return []


def _swap(folder: Path, out: Path, old: Path) -> None:
    """`folder` becomes `out`, whose old content goes to `old`."""
    replaces = out.exists()
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if replaces:
            old.rename(out)
        raise
