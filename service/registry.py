"""The registry: name@version -> an artifact that never changes.

An artifact is copied to `<home>/registry/<name>/<version>` under a scratch name and
renamed, then its row is written: a crash in between leaves a folder without a row, which
the next call takes over. One artifact of one job gets one version of a name, however
often it is registered. A name and all its versions belong to the project that claimed it first; names that timm has
weights of are claimed by nobody (`service.validation`).
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.principal import ALL, DEFAULT_PROJECT
from service.settings import Settings
from service.store import ModelName, ModelVersion, Store
from workloads.artifact import read_card


class Registry:
    """Registers artifacts and finds them."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._root, self._store = settings.registry, store
        self._owners: dict[str, ModelName] = {}

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
        with self._store.session() as session:
            claim(session, [name], DEFAULT_PROJECT)  # of a job by REST it is claimed already, for its own project
        card = read_card(artifact)
        version = newest + 1
        self._copy(artifact, self.folder(name, version))
        row = ModelVersion(
            name=name, version=version, kind=card.kind, job_id=job_id, source=source, card=card.model_dump(mode="json")
        )
        with self._store.session() as session:
            session.add(row)
        return row

    def taken(self, names: Sequence[str], project: str) -> list[str]:
        """Those of the names that a project other than `project` has."""
        with self._store.session() as session:
            return _taken(session, names, project)

    def owner(self, name: str) -> ModelName | None:
        """Whose the name is; asked for once, since that never changes."""
        if name not in self._owners:
            with self._store.session() as session:
                row = session.get(ModelName, name)
            if row is None:
                return None
            self._owners[name] = row
        return self._owners[name]

    def is_readable(self, name: str, project: str, since: float) -> bool:
        """Whether a job may read what has the name now, if it was submitted in `project` at the time `since`.

        What another project had registered before that, the submitter was asked for then: some see all projects.
        """
        owner = self.owner(name)
        if owner is None or owner.project == project:
            return True
        first = sa.select(sa.func.min(ModelVersion.created_at)).filter_by(name=name)
        with self._store.session() as session:
            registered_at = session.scalar(first)
        return registered_at is not None and registered_at < since

    def remembers(self, name: str) -> bool:
        """Whether `owner` answers without asking the database."""
        return name in self._owners

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
        if not rows:
            raise self.no_such_model(name)
        return rows

    def no_such_model(self, name: str, project: str = ALL) -> NotFound:
        """Says the nearest names of `project`."""
        names = [row.name for row in self.newest(project)]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:10]
        hint = f"registered are {', '.join(close)}" if close else "none is registered; run a job with `register`"
        return NotFound(f"got model {name!r}, which is not registered", hint)

    def newest(self, project: str = ALL) -> list[ModelVersion]:
        """The newest version of every name of `project`, by name."""
        query = sa.select(ModelVersion).order_by(ModelVersion.name, ModelVersion.version)
        if project != ALL:
            query = query.join(ModelName, ModelName.name == ModelVersion.name).where(ModelName.project == project)
        with self._store.session() as session:
            return list({row.name: row for row in session.scalars(query)}.values())

    def of_jobs(self, job_ids: Sequence[str]) -> dict[str, list[str]]:
        """`name@version` of everything that each of the jobs registered, in the order of registration."""
        found: dict[str, list[str]] = {job_id: [] for job_id in job_ids}
        query = sa.select(ModelVersion.job_id, ModelVersion.name, ModelVersion.version).order_by(ModelVersion.id)
        with self._store.session() as session:
            for job_id, name, version in session.execute(query.where(ModelVersion.job_id.in_(job_ids))):
                found[job_id].append(f"{name}@{version}")
        return found


def claim(session: Session, names: Sequence[str], project: str) -> list[str]:
    """Makes names that nobody has those of `project`, with the transaction; returns the ones that another has."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    for name in sorted(names):  # so two lists of jobs never wait for each other
        session.execute(insert(ModelName).values(name=name, project=project).on_conflict_do_nothing())
    return _taken(session, names, project)


def _taken(session: Session, names: Sequence[str], project: str) -> list[str]:
    taken = sa.select(ModelName.name).where(ModelName.name.in_(names), ModelName.project != project)
    return list(session.scalars(taken))
