"""Brings every job to a true state: decides by `service.decisions`, then acts.

Two guards keep a job from running twice: nothing is submitted while the run's heartbeat is fresh, and `workloads.run`
holds a lock on its folder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress

import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from service.adoption import Adoption
from service.attempts import Attempts
from service.checks import Checks
from service.decisions import STALE_S, Decision, brief, decide, ended, lives, said, stands
from service.errors import ServiceError, Unavailable
from service.lead import Lead
from service.observe.rounds import Rounds
from service.preemption import Preemption
from service.projects import quota_of
from service.queue import admitted, ordered
from service.ray_jobs import RayJobs, RayStatus, submission_id
from service.registry import Registry
from service.releases import Releases
from service.seen_nodes import SeenNodes
from service.settings import Settings
from service.store import ACTIVE, AWAY, SETTLED, TERMINAL, Job, JobState, Project, Store
from service.usage import Cluster, Entry
from workloads import preflight, tracing
from workloads.log_lines import about
from workloads.preflight import Check
from workloads.record import Record, RunFolder
from workloads.spec_deploy import is_deploy

logger = logging.getLogger(__name__)

GATHER_S = 0.03  # after a wake-up: the answer goes out first, and a burst of submissions becomes one round
AT_ONCE = 10_000  # values in a statement: SQLite takes 32,766, PostgreSQL 65,535


class Reconciler:
    """One thread that decides and acts for every job that is not finished."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        ray: RayJobs,
        registry: Registry,
        deployments: Callable[[], None],
        clock: Callable[[], float] = time.time,
        check: Check = preflight.check,
        *,
        releases: Releases,
        checkers: Executor | None = None,
    ) -> None:
        """Keeps its parts.

        Args:
            settings: of the service.
            store: the database.
            ray: Ray's Jobs API.
            registry: takes the artifacts of jobs that succeeded.
            deployments: brings Serve to what the table of deployments wants; called each round.
            clock: seconds since the epoch.
            check: what is wrong with a job whose parents have succeeded.
            releases: decides about entries that deploy, which are no jobs of Ray.
            checkers: run the checks; default: threads of its own.
        """
        self._releases = releases
        self._settings, self._store, self._ray = settings, store, ray
        self._deployments, self._clock = deployments, clock
        self.lead, self._seen_nodes = Lead(store.engine), SeenNodes(settings.home, clock)
        self._adoption = Adoption(settings, store, ray)
        self._attempts = Attempts(store, ray, registry, clock)
        self._beats: dict[str, tuple[float, float]] = {}  # job id -> its newest heartbeat, and when we saw it first
        self._wake = threading.Event()
        self._preemption = Preemption() if settings.preemption else None
        self._checks = Checks(check, settings.home, registry.is_readable, clock, self._wake.set, checkers)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        self.rounds = Rounds()
        self._sign: float | None = None  # monotonic time of the newest sign of life; None: it waits for the next round
        self.ray_error: str | None = "Ray has not been asked yet"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the job that it is at. Runs are left alone; another front end may lead from now on."""
        self._done.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._checks.close()
        self.lead.release()

    @property
    def silent_s(self) -> float:
        """Seconds since the newest sign of life in the round that it is in; between rounds 0."""
        since = self._sign
        return 0.0 if since is None else time.monotonic() - since

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        """Something changed: look now."""
        self._wake.set()

    def _run(self) -> None:
        while not self._done.is_set():
            self._wake.clear()
            self._sign = time.monotonic()
            try:
                if self.lead.held():
                    with self.rounds.timed():
                        self.round()
                else:
                    self.stand_by()
            except Exception:
                logger.exception("a round of the reconciler failed; the next one tries again")
            self._sign = None
            if self._wake.wait(self._settings.reconcile_interval_s):
                self._done.wait(GATHER_S)

    def stand_by(self) -> None:
        """What every front end does while another one leads: see whether its Ray is there, and serve models on it."""
        self._checks.keep(())
        try:
            self._ray.statuses()
        except Unavailable as error:
            self.ray_error = error.detail
            return
        self.ray_error = None
        self._deployments()

    def round(self) -> None:
        """Looks at every unfinished job once."""
        try:
            statuses = self._ray.statuses()
            hardware = self._ray.hardware()
            self._adoption.look()
        except Unavailable as error:
            self.ray_error = error.detail
            return
        self.ray_error = None
        self._seen_nodes.see(hardware)
        with self._store.session() as session:
            place = sa.func.coalesce(Job.resumed_at, Job.created_at), Job.number
            jobs = list(session.scalars(sa.select(Job).where(Job.state.not_in(SETTLED)).order_by(*place)))
            named = {parent for job in jobs if job.held for parent in job.after}
            states = _states(session, sorted(named))
            quotas = {row.name: quota_of(row) for row in session.scalars(sa.select(Project))}
        active = [job for job in jobs if job.state in ACTIVE and job.cpus]  # a deployment needs nothing of the cluster
        now = self._clock()
        cluster = Cluster(hardware, quotas, [Entry.of(job, hardware, now) for job in active])
        unheld = (job for job in jobs if job.state == "QUEUED" and not job.held and job.cpus)
        queue = ordered((Entry.of(job, hardware, now) for job in unheld), cluster)
        verdicts = list(admitted(queue, cluster))
        starting = {entry.id for entry, wait in verdicts if wait is None}
        for job in jobs:
            if self._done.is_set():
                return
            self._sign = time.monotonic()
            try:
                parents = {parent: states.get(parent) for parent in job.after}
                ray = statuses.get(submission_id(job.id, job.attempt))
                self._settle(job, ray, job.id in starting, parents)
            except StaleDataError:
                logger.info("job %s changed meanwhile; looked at again in the next round", job.id)
            except AWAY:
                raise  # so is every other row
            except Exception as error:  # whatever it is, it is this job's alone
                self._tell(job, error)
        self._checks.keep({job.id for job in jobs if job.held})
        if self._preemption is not None:
            self._make_room(active, *self._preemption.choose(verdicts, active, hardware, quotas, self._clock()))
        self._deployments()

    def _make_room(self, active: Sequence[Job], blocked: str, giving_way: Iterable[str]) -> None:
        """Pauses jobs of lower priority."""
        numbers = {job.id: job.number for job in active}
        for job_id in giving_way:
            with suppress(StaleDataError), self._store.session() as session:
                row = session.get(Job, numbers[job_id])
                assert row is not None
                if row.state in ("STARTING", "RUNNING"):
                    row.become("PAUSING", f"gives way to {blocked}, whose priority is higher")
                    row.gives_way = True
                    self._wake.set()

    def _settle(self, job: Job, ray: RayStatus | None, fits: bool, parents: Mapping[str, JobState | None]) -> None:
        """Decides and acts for one job."""
        with about(job_id=job.id, project=job.project):
            if is_deploy(job.spec):
                self._write(job, self._releases.settle(job, parents), None)
            else:
                self._settle_run(job, ray, fits, parents)

    def _settle_run(self, job: Job, ray: RayStatus | None, fits: bool, parents: Mapping[str, JobState | None]) -> None:
        run = RunFolder(self._settings.runs / job.id)
        # ten thousand that wait for the first time have none, but in a database restored from before they ran
        record = run.read_record() if job.attempt or job.id in self._adoption.folders else None
        now = self._clock()
        alive = self._alive(job.id, record, now)
        most = self._settings.max_attempts
        decision = decide(job, ray, record, now, alive=alive, fits=fits, max_attempts=most, parents=parents)
        self.rounds.acted(decision.act)
        ends = decision.act == "submit" or decision.state == "FAILED"
        if job.state in ACTIVE and ends and not ended(job, record):
            self._attempts.keep_last_words(job, run)
        if decision.act in ("submit", "resubmit"):
            self._attempts.submit(job, run, record, again=decision.act == "resubmit")
        elif decision.act == "stop":
            run.stop.touch()
            with tracing.span("stop attempt", {"manta.job.id": job.id}, parent=job.traceparent):
                self._ray.stop(job.id, job.attempt)
        elif decision.act == "finish" and decision.state == "SUCCEEDED":
            with tracing.span("register", {"manta.job.id": job.id}, parent=job.traceparent):
                self._attempts.register(job, run)
        elif decision.act == "check":
            decision = self._checks.decide(job)
        gave_way = job.state == "PAUSING" and decision.state == "QUEUED"
        if (gave_way or decision.state in ("FAILED", "CANCELLED", "PAUSED")) and job.attempt:
            run.path.mkdir(parents=True, exist_ok=True)
            run.stop.touch()  # a process that nobody hears of may still come, or come back
        self._write(job, decision, record)

    def _tell(self, job: Job, error: Exception) -> None:
        """Why nothing goes on with a job becomes its reason, until the next round that does better."""
        reason = f"the service could not go on with it and tries again: {brief(error)}"
        if job.reason == reason:
            return  # said before
        expected = isinstance(error, (ServiceError, ValueError, OSError))
        logger.warning("job %s: %s", job.id, reason, exc_info=None if expected else error)
        with suppress(StaleDataError), self._store.session() as session:
            row = session.get(Job, job.number)
            assert row is not None
            if row.revision == job.revision:
                row.reason = reason

    def _alive(self, job_id: str, record: Record | None, now: float) -> bool:
        """`lives`, unless its heartbeat stands still: the clock of its node may be hours ahead of ours."""
        if record is None or not lives(record, now):
            self._beats.pop(job_id, None)
            return False
        beat, since = self._beats.get(job_id, (record.updated_at, now))
        if beat != record.updated_at or since > now:
            since = now
        self._beats[job_id] = record.updated_at, since
        return now - since <= STALE_S

    def _write(self, job: Job, decision: Decision, record: Record | None) -> None:
        """Puts what is true into the row, if it changed: for most of a long queue that costs nothing."""
        if stands(job, decision, record):
            return
        with self._store.session() as session:
            row = session.get(Job, job.number)
            assert row is not None
            if row.revision != job.revision:
                raise StaleDataError(job.id)  # a cancel came in between
            if row.state != decision.state:
                row.become(decision.state, decision.reason or said(row, decision))
            row.reason, row.hint = decision.reason, decision.hint
            row.gives_way = row.gives_way and decision.state == "PAUSING"
            if decision.act == "check":
                row.held = False
                self._wake.set()  # it is submitted in the next round
            if record is not None and (record.attempt == row.attempt or record.state == "SUCCEEDED"):
                row.step, row.epoch, row.total_steps = record.step, record.epoch, record.total_steps
                row.started_at = row.started_at or record.started_at
            if decision.state == "RUNNING":
                row.started_at = row.started_at or self._clock()
            if decision.state in TERMINAL:
                at = record.finished_at if record is not None and ended(row, record) else None
                row.finished_at = at or self._clock()
                logger.info("job %s: %s %s", job.id, decision.state, decision.reason or "")
        if self._preemption is not None and job.state in ACTIVE and decision.state not in ACTIVE and job.cpus:
            self._preemption.left(job, self._clock())


def _states(session: Session, job_ids: Sequence[str]) -> dict[str, JobState]:
    """Those of the jobs that are in the table."""
    found: dict[str, JobState] = {}
    for start in range(0, len(job_ids), AT_ONCE):
        some = sa.select(Job.id, Job.state).where(Job.id.in_(job_ids[start : start + AT_ONCE]))
        found |= {job_id: state for job_id, state in session.execute(some)}
    return found
