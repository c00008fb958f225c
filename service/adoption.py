"""Runs that came by `ray job submit`, or by themselves on another cluster, become rows of the list."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import sqlalchemy as sa

from service.decisions import brief
from service.errors import Unavailable
from service.ray_jobs import RayJobs, RayStatus
from service.settings import Settings
from service.store import AWAY, LONGEST_ID, Job, Store
from workloads.record import Record, RunFolder
from workloads.spec_any import AnySpec, spec_of

logger = logging.getLogger(__name__)


class Adoption:
    """Looks at the names in the folder of runs.

    Attributes:
        folders: names that were there when it looked last.
    """

    def __init__(self, settings: Settings, store: Store, ray: RayJobs) -> None:
        self._settings, self._store, self._ray = settings, store, ray
        self.folders: set[str] = set()
        self._known: set[str] = set()  # ids in the table, whose rows are never deleted
        self._unreadable: set[str] = set()  # run folders that are none, said once

    def look(self) -> None:
        """Rows for runs that are in none.

        Raises:
            Unavailable: Ray does not answer.
        """
        runs = self._settings.runs
        self.folders = set(os.listdir(runs)) if runs.is_dir() else set()  # noqa: PTH208 ten thousand names
        new = self.folders - self._known - self._unreadable
        if not new:
            return
        with self._store.session() as session:
            self._known = set(session.scalars(sa.select(Job.id)))
        here: Mapping[str, RayStatus] | None = None
        for path in (runs / name for name in sorted(new - self._known)):
            run = RunFolder(path)
            try:
                record = run.read_record()
                if record is None or not run.spec.exists():
                    continue  # no run yet, or none at all
                spec = spec_of(run)
                if here is None:
                    here = self._ray.statuses()  # anew: a run is known to Ray before it has a folder
                self._follow(path.name, spec, record, ours=path.name in here)
            except (Unavailable, *AWAY):
                raise
            except Exception as error:  # one such folder must not keep the others from their round
                logger.warning("%s is not followed: %s", ascii(str(path)), brief(error))
                self._unreadable.add(path.name)

    def _follow(self, job_id: str, spec: AnySpec, record: Record, *, ours: bool) -> None:
        """A row for a run that this cluster's Ray knows, or that works on another one."""
        if len(job_id) > LONGEST_ID:
            raise ValueError(
                f"got a name of {len(job_id)} characters, expected at most {LONGEST_ID}; use a shorter one"
            )
        job = Job(
            id=job_id,
            name=spec.name,
            spec=spec.model_dump(mode="json"),
            origin="ray" if ours else "outside",
            attempt=record.attempt,
            created_at=record.started_at,
            cpus=spec.resources.cpus,
            gpus=spec.resources.gpus,
            custom=spec.resources.custom,
            most_gpus=spec.resources.most_gpus,
        )
        job.become("STARTING", "came by `ray job submit`" if ours else "came by itself, on another cluster")
        with self._store.session() as session:
            session.add(job)
        logger.info("job %s %s and is followed from now on", job_id, "came by Ray" if ours else "is of another cluster")
