"""The files of checkpoints: which are whole, which stay. Of tensors it knows nothing.

    checkpoints/step-00000050.pt     the state (or the folder step-00000050/ when it is sharded)
    checkpoints/step-00000050.json   its seal: size and SHA-256 of each file, written after them
    checkpoints/latest               the name of the newest sealed one, replaced by rename; after a guard has ended the
                                     run, of the newest from before its first sign
    checkpoints/mirrored             the newest step up to which the mirror has all, where there is a mirror

What has no seal, or does not agree with it, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict

from workloads.record import write_atomic
from workloads.spec_training import CheckpointPolicy

MIRRORED = "mirrored"
_NAME = re.compile(r"step-(\d{8,})(\.[a-z]+)?")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the one before it is whole."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = message, hint
        super().__init__(message, hint)

    def __str__(self) -> str:
        return self.message


class FileSum(BaseModel):
    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class Seal(BaseModel):
    """What makes a checkpoint whole.

    Attributes:
        step: optimizer steps done.
        files: by path below the folder of checkpoints.
        metric: what `keep_best` goes by; None: never among the best.
        time: of writing, seconds since the epoch.
        seconds: that writing took, beside training.
        suspect: a guard had begun to count: if it ends the run, this is what it ended.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    files: dict[str, FileSum]
    metric: float | None
    time: float
    seconds: float | None = None
    suspect: bool = False

    @property
    def name(self) -> str:
        """The file, or the folder, that holds the state."""
        return next(iter(self.files)).split("/")[0]


def stem(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a file or folder of a checkpoint belongs to; None where it is none."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def latest_step(folder: Path) -> int | None:
    """Steps done at the newest checkpoint, None where there is none."""
    try:
        return step_of((folder / "latest").read_text().strip())
    except FileNotFoundError:
        return None


def kept(seals: Iterable[Seal], policy: CheckpointPolicy, newest: int) -> set[int]:
    """Steps that stay: the newest `keep`; of those that are not suspect the newest, and the `keep_best` best by metric.

    Those after `newest` do not: the run went back behind them, and will come to those steps again.
    """
    past = sorted((seal for seal in seals if seal.step <= newest), key=lambda seal: -seal.step)
    sign = 1 if policy.mode == "min" else -1
    good = [seal for seal in past if not seal.suspect]
    best = sorted((seal for seal in good if seal.metric is not None), key=lambda seal: sign * (seal.metric or 0.0))
    return {newest} | {seal.step for seal in past[: policy.keep] + good[:1] + best[: policy.keep_best]}


class HashingFile:
    """A file being written whose SHA-256 is known at its end, so that it is not read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self._sha.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sum(self) -> FileSum:
        return FileSum(bytes=self._bytes, sha256=self._sha.hexdigest())


def sum_of(path: Path) -> FileSum:
    with open(path, "rb") as file:
        return FileSum(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def damage(folder: Path, seal: Seal) -> str | None:
    """What is wrong with the files of a checkpoint, None where they are as they were written."""

    def look(item: tuple[str, FileSum]) -> str | None:
        name, expected = item
        try:
            size = (folder / name).stat().st_size
            if size != expected.bytes:
                return f"{name} has {size} of {expected.bytes} bytes"
            return None if sum_of(folder / name) == expected else f"the sha256 of {name} differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"

    with ThreadPoolExecutor(8) as pool:
        return next((problem for problem in pool.map(look, seal.files.items()) if problem), None)


def read_seal(folder: Path, step: int) -> Seal | None:
    """The seal of a checkpoint, None where there is none that can be read."""
    try:
        return Seal.model_validate_json((folder / f"{stem(step)}.json").read_bytes())
    except (OSError, ValueError):
        return None


def seals(folder: Path) -> list[Seal]:
    found = (read_seal(folder, step) for step in _entries(folder))
    return [seal for seal in found if seal is not None]


def steps(folder: Path) -> list[int]:
    """Steps up to the latest of which there is a trace, newest first.

    Where no latest can be read, those that were sealed: of others a first write was cut short, which is no damage.
    """
    latest = latest_step(folder)
    found = _entries(folder).items()
    if latest is None:
        return sorted((step for step, paths in found if any(path.suffix == ".json" for path in paths)), reverse=True)
    return sorted((step for step, _ in found if step <= latest), reverse=True)


def mirrored_step(folder: Path) -> int | None:
    """The newest step that the mirror had when it was last brought up to date; None where it never was."""
    try:
        return int((folder / MIRRORED).read_text())
    except (FileNotFoundError, ValueError):
        return None


def complete(folder: Path, seal: Seal) -> None:
    """Seals a checkpoint whose files are on the disk, and makes it the latest.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    write_atomic(folder / f"{stem(seal.step)}.json", seal.model_dump_json())
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the names too must be there after a power cut, before `latest` says so
    finally:
        os.close(handle)
    write_atomic(folder / "latest", seal.name)


def go_back(folder: Path) -> int | None:
    """Makes the newest that is not suspect the latest -> its step; None where there is none, and nothing changes."""
    latest = latest_step(folder) or 0
    good = max((s for s in seals(folder) if s.step <= latest and not s.suspect), key=lambda s: s.step, default=None)
    if good is None:
        return None
    write_atomic(folder / "latest", good.name)
    return good.step


def given_up(folder: Path) -> list[int]:
    """Steps of the suspect checkpoints that a run went back from."""
    latest = latest_step(folder)
    return sorted(seal.step for seal in seals(folder) if seal.suspect and latest is not None and seal.step > latest)


def prune(folder: Path, policy: CheckpointPolicy, newest: int) -> None:
    """Removes what does not stay, and what writes that were cut short have left."""
    stay = kept(seals(folder), policy, newest)
    for step, paths in _entries(folder).items():
        if step not in stay:
            for path in sorted(paths, key=lambda path: path.suffix != ".json"):  # the seal first
                remove(path)
    for scratch in folder.glob(".*.tmp"):  # of seals and pointers
        remove(scratch)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _entries(folder: Path) -> dict[int, list[Path]]:
    entries: dict[int, list[Path]] = defaultdict(list)
    for path in folder.iterdir() if folder.is_dir() else ():
        if (step := step_of(path.name)) is not None:
            entries[step].append(path)
    return entries
