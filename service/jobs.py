"""What users do with jobs that are there: look, pause, resume, cancel. `service.submissions` accepts them.

    QUEUED -> STARTING -> RUNNING -> SUCCEEDED | FAILED
       |         |           |
       |         +-----------+--> CANCELLING -> CANCELLED
       |         +-----------+--> PAUSING ----> PAUSED -> QUEUED   (a job that finishes first has finished)
       +--> PAUSED | CANCELLED

`service.transitions` has what each request makes of each state; `service.reconciler` does the rest. Times in answers
are ISO 8601 in UTC.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.orm.exc import StaleDataError

from service.decisions import brief
from service.errors import Conflict, NotFound
from service.events import START, read_events
from service.job_views import Comparison, EventView, JobView, QueueView, Results
from service.patches import differences
from service.principal import ALL
from service.projects import expect_room
from service.registry import Registry
from service.settings import Settings
from service.standing import Place, Standing
from service.store import SETTLED, TERMINAL, Job, JobState, Store
from service.transitions import CANCEL, LENGTHEN, LENGTHEN_ENDED, PAUSE, RESUME, RETRY, Request
from workloads.record import RunFolder
from workloads.spec_deploy import is_deploy
from workloads.winner import read_found

T = TypeVar("T")


class Jobs:
    """The table of jobs as users see it."""

    def __init__(
        self, settings: Settings, store: Store, registry: Registry, standing: Standing, wake: Callable[[], None]
    ) -> None:
        """Keeps its parts.

        Args:
            settings: of the service.
            store: the database.
            registry: asked for what a job registered.
            standing: where a job stands in the queue.
            wake: tells the reconciler that there is something to do.
        """
        self._settings, self._store, self._registry = settings, store, registry
        self._standing, self._wake = standing, wake

    def find(self, job_id: str) -> Job | None:
        with self._store.session() as session:
            return session.scalar(sa.select(Job).filter_by(id=job_id))

    def get(self, job_id: str) -> Job:
        job = self.find(job_id)
        if job is None:
            raise no_such_job(job_id)
        return job

    def cancel(self, job_id: str) -> Job:
        """Asks a job to stop with a last checkpoint; a job that is finished or cancelled stays as it is."""
        return self._ask(job_id, CANCEL)

    def pause(self, job_id: str) -> Job:
        """Asks a job to stop with a checkpoint and to give back what it runs on; a paused job stays as it is.

        Raises:
            Conflict: it is finished, or about to be cancelled.
        """
        return self._ask(job_id, PAUSE)

    def resume(self, job_id: str, max_duration: float | None = None) -> Job:
        """Puts a paused job at the end of the queue, to go on from its checkpoint; a running one stays as it is.

        Args:
            job_id: paused; with `max_duration` also one that reached the one it had.
            max_duration: in place of the job's own, in seconds of training over all attempts.

        Raises:
            Conflict: it is finished, or still about to stop, or `max_duration` is over already.
            TooMany: it had ended, and its project has as many unfinished jobs as it may.
        """
        job = self.get(job_id)
        if max_duration is not None and is_deploy(job.spec):
            raise Conflict(f"got max_duration for {job_id}, which trains nothing", "resume it without")
        ours = job.spec.get("max_duration")
        if max_duration is None or (max_duration == ours and job.state in RESUME.moves):  # the same request again
            return self._ask(job_id, RESUME)
        record = self.run_folder(job_id).read_record()
        ran_s = record.ran_s if record else 0.0
        request = LENGTHEN if ours is None or ran_s < ours else LENGTHEN_ENDED
        request.next_state(job_id, job.state)  # first what no time would change
        if max_duration <= ran_s:
            detail = f"got max_duration of {max_duration:.9g} s for {job_id}, which has trained for {ran_s:.0f} s"
            raise Conflict(detail, "ask for more: it is of all attempts together")
        return self._ask(job_id, request, max_duration)

    def _ask(self, job_id: str, request: Request, max_duration: float | None = None) -> Job:
        while True:
            job = self.get(job_id)
            state = request.next_state(job_id, job.state)
            if state == job.state and not job.gives_way:
                return job
            try:
                with self._store.session() as session:
                    row = session.get(Job, job.number)
                    assert row is not None
                    if row.revision != job.revision:
                        continue
                    row.gives_way = False  # what a user asks for stands above what the queue wanted
                    row.become(state, request.reason)
                    row.reason, row.hint = (request.reason if state in SETTLED else None), None
                    row.finished_at = _now() if state in TERMINAL else None
                    if state == "QUEUED":
                        row.resumed_at = _now()
                    if max_duration is not None:
                        row.spec = row.spec | {"max_duration": max_duration}
                    if job.state in TERMINAL and state not in TERMINAL:
                        session.flush()
                        expect_room(session, row.project)
            except StaleDataError:
                continue  # the reconciler wrote at the same moment: look again
            self._wake()
            return self.get(job_id)

    def retry(self, job_id: str) -> Job:
        """Puts a job that failed or was cancelled into the queue, to go on from its checkpoint, if it wrote one.

        Raises:
            Conflict: it succeeded, is paused, or about to stop.
            TooMany: its project has as many unfinished jobs as it may.
        """
        return self._ask(job_id, RETRY)

    def diff(self, job_id: str, other_id: str) -> Comparison:
        """Where the specs of two jobs differ, and what their runs were made of, so far as both have begun."""
        ids = job_id, other_id
        ours, theirs = (self.get(name).spec for name in ids)
        folders = [self.run_folder(name).provenance for name in ids]
        made_of = [json.loads(path.read_text()) for path in folders if path.exists()]
        return {
            "a": job_id,
            "b": other_id,
            "spec": differences(ours, theirs),
            "provenance": differences(made_of[0], made_of[1]) if len(made_of) == len(ids) else [],
        }

    def events(self, job_id: str, after: str = START) -> list[EventView]:
        """What happened to a job, behind the cursor `after`."""
        return read_events(self._store, self.get(job_id), self.run_folder(job_id), after)

    def views(self, jobs: Sequence[Job]) -> list[JobView]:
        """Jobs as answers; the database is asked once for all of them."""
        models = self._registry.of_jobs([job.id for job in jobs])
        return [self._view(job, models[job.id]) for job in jobs]

    def view(self, job: Job) -> JobView:
        return self.views([job])[0]

    def list(
        self, *, limit: int, before: int | None = None, state: JobState | None = None, project: str = ALL
    ) -> list[Job]:
        """Newest first; `before` is the number of the last job of the page before."""
        query = sa.select(Job).order_by(Job.number.desc()).limit(limit)
        if before is not None:
            query = query.where(Job.number < before)
        if state is not None:
            query = query.where(Job.state == state)
        if project != ALL:
            query = query.where(Job.project == project)
        with self._store.session() as session:
            return list(session.scalars(query))

    def run_folder(self, job_id: str) -> RunFolder:
        return RunFolder(self._settings.runs / self.get(job_id).id)

    def _view(self, job: Job, models: builtins.list[str]) -> JobView:
        run, ran = RunFolder(self._settings.runs / job.id), job.attempt > 0  # else there is no folder to look into
        damaged: list[str] = []
        record = _told(run.read_record, None, damaged) if ran else None
        evaluations: Results = _told(run.read_evaluations, [], damaged) if ran else []
        found = _told(lambda: read_found(run.artifact), None, damaged) if ran and "search" in job.spec else None
        return {
            "id": job.id,
            "name": job.name,
            "project": job.project,
            "owner": job.owner,
            "state": job.state,
            "attempt": job.attempt,
            "after": job.after,
            "reason": job.reason,
            "hint": job.hint,
            "priority": job.spec.get("priority", "normal"),
            "queue": _place(self._standing.of(job)),
            "method": job.spec["method"]["name"] if "method" in job.spec else None,
            "search": job.spec["search"]["name"] if "search" in job.spec else None,
            "deploy": job.spec["deploy"]["model"] if "deploy" in job.spec else None,
            "origin": job.origin,
            "created_at": _iso(job.created_at),
            "started_at": _iso_or_none(job.started_at),
            "finished_at": _iso_or_none(job.finished_at),
            "progress": {"step": job.step, "total_steps": job.total_steps, "epoch": job.epoch},
            "ran_s": record.ran_s if record else 0.0,
            "skipped": record.skipped if record else [],
            "warnings": [*(record.warnings if record else []), *damaged],
            "evaluations": evaluations,
            "models": models,
            "found": found.summary() if found else None,
            "spec": job.spec,
        }


def no_such_job(job_id: str) -> NotFound:
    return NotFound(f"got job {job_id!r}, which does not exist", "GET /v1/jobs lists them")


def _told(read: Callable[[], T], otherwise: T, damaged: builtins.list[str]) -> T:
    """What a file of a run says; why one cannot be read goes into `damaged`: it keeps no other job from its answer."""
    try:
        return read()
    except (OSError, ValueError) as error:
        damaged.append(f"a file of the run cannot be read: {brief(error)}")
        return otherwise


def _place(place: Place | None) -> QueueView | None:
    return None if place is None else {**place, "expected_start": _iso_or_none(place["expected_start"])}


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _iso_or_none(seconds: float | None) -> str | None:
    return None if seconds is None else _iso(seconds)
