"""Backup and restore of an installation; a backup is made while the service runs.

    TARGET/
        backup.json   what it is: revision, rows of each table, SHA-256 of every file; written last
        manta.db      the database at one moment
        registry/     the artifacts of every version that the database knows
        runs/         the folders of the jobs that it knows: curves, logs, artifacts; checkpoints only where asked for

First the database, then the folders. An artifact lies in the registry before its row is written, so what the database
knows is there. A run folder may be newer than its row, which is what a service finds after every restart: it looks at
the record of the run and goes on. Folders of younger jobs are left out, else they would be adopted as strangers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from service import backup_database
from service.backup_database import BackupError
from service.settings import Settings
from workloads.record import RunFolder, write_atomic

MANIFEST, DATABASE = "backup.json", "manta.db"
CHECKPOINTS = frozenset({"checkpoints", "online"})  # in a run folder: large, and nothing but speed is lost
NOT_HELD = (
    "shards, mirrors of checkpoints, Ray's token and state, the file of the first admin token, and the settings "
    "(MANTA_...), which hold the password of the database"
)


class Manifest(BaseModel):
    """What `backup.json` holds."""

    format: int = 1
    version: str
    made_at: str
    revision: str
    counts: dict[str, int]
    checkpoints: bool
    files: dict[str, str]  # path -> SHA-256


def backup(settings: Settings, target: Path, *, checkpoints: bool = False) -> Manifest:
    """Writes a backup of the installation, whole or not at all.

    Args:
        settings: of the installation.
        target: a folder that does not exist yet.
        checkpoints: also those of runs; without them a job that is not finished begins anew after a restore.

    Raises:
        BackupError: the target exists, or there is no installation.
        OSError: a disk is full, or an artifact of the registry is missing.
    """
    if target.exists():
        raise BackupError(f"got {target}, which exists, expected a new folder")
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a backup that broke off
    scratch.mkdir(mode=0o700, parents=True)
    try:
        backup_database.save(settings.database, scratch / DATABASE)
        held = backup_database.contents(f"sqlite:///{scratch / DATABASE}")
        for name, version in backup_database.rows(scratch / DATABASE, "SELECT name, version FROM model_versions"):
            shutil.copytree(settings.registry / name / str(version), scratch / "registry" / name / str(version))
        for (job_id,) in backup_database.rows(scratch / DATABASE, "SELECT id FROM jobs"):
            _copy_run(RunFolder(settings.runs / job_id), scratch / "runs" / job_id, checkpoints)
        manifest = Manifest(
            version=importlib.metadata.version("manta"),
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            revision=held.revision,
            counts=held.counts,
            checkpoints=checkpoints,
            files={str(path.relative_to(scratch)): _digest(path) for path in _files(scratch)},
        )
        write_atomic(scratch / MANIFEST, manifest.model_dump_json(indent=1))
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return manifest


def restore(settings: Settings, source: Path) -> Manifest:
    """Brings a backup into an empty home and an empty database, and looks at what is there then.

    The database comes last: a restore that breaks off leaves none, so no service starts on half of it.

    Raises:
        BackupError: the backup is damaged, or something would be overwritten.
    """
    manifest = verified(source)
    for folder in (settings.runs, settings.registry):
        if folder.exists() and any(folder.iterdir()):
            raise BackupError(f"got {folder}, which is not empty; move it away, or restore into another home")
    backup_database.expect_empty(settings.database)
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (settings.runs, settings.registry):
        if (source / folder.name).exists():
            shutil.copytree(source / folder.name, folder, dirs_exist_ok=True)
    backup_database.load(source / DATABASE, settings.database)
    held = backup_database.contents(settings.database)
    if (held.revision, held.counts) != (manifest.revision, manifest.counts):
        raise BackupError(f"got {held} in the database after the restore, expected {manifest.counts}; use it not")
    return manifest


def verified(source: Path) -> Manifest:
    """What a backup holds, after a look at all of it.

    Raises:
        BackupError: it is none, incomplete or damaged.
    """
    try:
        manifest = Manifest.model_validate_json((source / MANIFEST).read_text())
    except (OSError, ValidationError) as error:
        raise BackupError(f"got {source}, which is no backup: {error}") from error
    found = {str(path.relative_to(source)): path for path in _files(source) if path.name != MANIFEST}
    if missing := sorted(manifest.files.keys() - found.keys()):
        raise BackupError(f"got {source} without {missing[0]} and {len(missing) - 1} other files; use another backup")
    for name, digest in manifest.files.items():
        if _digest(found[name]) != digest:
            raise BackupError(f"got {source} with a damaged {name}, expected SHA-256 {digest}; use another backup")
    backup_database.check(source / DATABASE)
    held = backup_database.contents(f"sqlite:///{source / DATABASE}")
    if (held.revision, held.counts) != (manifest.revision, manifest.counts):
        raise BackupError(f"got {held} in {source / DATABASE}, expected {manifest.revision}, {manifest.counts}")
    return manifest


def _copy_run(run: RunFolder, target: Path, checkpoints: bool) -> None:
    """Copies a run folder that may be written at this moment.

    The record first, so that all else is at least as new as it says. Of checkpoints the newest first, before it is
    pruned, and `latest` after all of them, since what it names and is not there falls back to the one before.
    """
    left_out = frozenset[str]() if checkpoints else CHECKPOINTS
    for path in (run.record, *sorted(_files(run.path, left_out), reverse=True)):
        place = target / path.relative_to(run.path)
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # it was replaced or pruned meanwhile
            shutil.copy2(path, place)


def _files(folder: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below a folder, but for those that are being written under another name."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]
        yield from (Path(path) / name for name in names if not (name.startswith(".") and name.endswith(".tmp")))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
