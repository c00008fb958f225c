"""The registry: name@version -> an artifact that never changes.

An artifact is copied to `<home>/registry/<name>/<version>` under a scratch name and
renamed, then its row is written: a crash in between leaves a folder without a row, which
the next call takes over. One artifact of one job gets one version of a name, however
often it is registered.
"""

from __future__ import annotations

import difflib
import os
import shutil
from pathlib import Path

import sqlalchemy as sa

from service.errors import NotFound
from service.settings import Settings
from service.store import ModelVersion, Store
from workloads.artifact import read_card


class Registry:
    """Registers artifacts and finds them."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._root, self._store = settings.registry, store

    def register(self, name: str, artifact: Path, job_id: str, source: str) -> ModelVersion:
        """Makes `artifact` the next version of `name`; a second call returns the same version.

        Args:
            name: in the registry.
            artifact: the folder to copy.
            job_id: of the job that left it.
            source: its path in the run folder, which tells the artifacts of one job apart.
        """
        with self._store.session() as session:
            known = session.scalar(sa.select(ModelVersion).filter_by(name=name, job_id=job_id, source=source))
            if known is not None:
                return known
            newest = session.scalar(sa.select(sa.func.max(ModelVersion.version)).filter_by(name=name)) or 0
        card = read_card(artifact)
        version = newest + 1
        self._copy(artifact, self.folder(name, version))
        row = ModelVersion(
            name=name, version=version, kind=card.kind, job_id=job_id, source=source, card=card.model_dump(mode="json")
        )
        with self._store.session() as session:
            session.add(row)
        return row

    def _copy(self, artifact: Path, target: Path) -> None:
        scratch = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)  # left by a crash before its row was written
        shutil.copytree(artifact, scratch)
        for path in scratch.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        scratch.replace(target)

    def folder(self, name: str, version: int) -> Path:
        return self._root / name / str(version)

    def get(self, name: str, version: int | None = None) -> ModelVersion:
        """The version, or the newest.

        Raises:
            NotFound: says the nearest names, or the versions that there are.
        """
        versions = self.versions(name)
        if version is None:
            return versions[0]
        for row in versions:
            if row.version == version:
                return row
        raise NotFound(f"got version {version} of {name}, expected one of {[row.version for row in versions]}")

    def versions(self, name: str) -> list[ModelVersion]:
        """Newest first; raises NotFound for a name without any."""
        query = sa.select(ModelVersion).filter_by(name=name).order_by(ModelVersion.version.desc())
        with self._store.session() as session:
            rows = list(session.scalars(query))
            names = [] if rows else list(session.scalars(sa.select(ModelVersion.name).distinct()))
        if not rows:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)[:10]
            hint = f"registered are {', '.join(close)}" if close else "none is registered; run a job with `register`"
            raise NotFound(f"got model {name!r}, which is not registered", hint)
        return rows

    def newest(self) -> list[ModelVersion]:
        """The newest version of every name, by name."""
        with self._store.session() as session:
            rows = session.scalars(sa.select(ModelVersion).order_by(ModelVersion.name, ModelVersion.version))
            return list({row.name: row for row in rows}.values())

    def of_job(self, job_id: str) -> list[str]:
        """`name@version` of everything that a job registered."""
        query = sa.select(ModelVersion).filter_by(job_id=job_id).order_by(ModelVersion.id)
        with self._store.session() as session:
            return [f"{row.name}@{row.version}" for row in session.scalars(query)]
