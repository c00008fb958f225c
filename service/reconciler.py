"""Brings every job to a true state: decide, then act.

`decide` is pure: the row, what Ray says, what the run says of itself. The order of truth
is ours: a row that is terminal stays; then the run's own record; Ray's status is a hint,
since Ray loses jobs with its head and can call a living one FAILED. Two guards keep a
job from running twice: nothing is submitted while the run's heartbeat is fresh, and
`workloads.run` holds a lock on its folder.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import psutil
import sqlalchemy as sa
from sqlalchemy.orm.exc import StaleDataError

from service.dependencies import lost, waiting, waits_for
from service.errors import ServiceError, Unavailable
from service.logs import Wanted, part
from service.ray_jobs import RayJobs, RayStatus, submission_id
from service.registry import Registry
from service.settings import Settings
from service.store import ACTIVE, SETTLED, TERMINAL, Job, JobState, Store
from workloads import preflight
from workloads.log_file import append
from workloads.preflight import Check
from workloads.record import HEARTBEAT_S, Record, RunFolder, write_atomic
from workloads.spec_any import parse_spec, spec_of
from workloads.spec_deploy import is_deploy

if TYPE_CHECKING:  # it decides by the words of this file
    from service.releases import Releases

logger = logging.getLogger(__name__)

STALE_S = 4 * HEARTBEAT_S  # a run that has been silent for so long is dead
GATHER_S = 0.03  # after a wake-up: the answer goes out first, and a burst of submissions becomes one round
LAST_WORDS = 1 << 14  # characters
MAX_BACKOFF_S = 60.0  # between attempts that make no progress: 2, 4, 8, ... s


@dataclass(frozen=True)
class Decision:
    """What to do about a job, and the state that is true.

    `submit` starts the next attempt, `resubmit` the same one again: Ray never heard of it. `check` looks whether a job
    can run whose parents have succeeded.
    """

    act: Literal["submit", "resubmit", "stop", "finish", "check", "none"]
    state: JobState
    reason: str | None = None
    hint: str | None = None


def lives(record: Record | None, now: float) -> bool:
    """Whether the process of the record is at work: its heartbeat is fresh, and its pid not known to be gone."""
    if record is None or record.state not in ("STARTING", "RUNNING") or now - record.updated_at > STALE_S:
        return False
    return record.host != socket.gethostname() or psutil.pid_exists(record.pid)


def decide(
    row: Job,
    ray: RayStatus | None,
    record: Record | None,
    now: float,
    *,
    alive: bool,
    fits: bool,
    max_attempts: int,
    parents: Mapping[str, JobState | None],
) -> Decision:
    """What is true of a job, and what to do.

    Args:
        row: our row.
        ray: Ray's status of the attempt; None: Ray does not know it.
        record: what the run said last.
        now: seconds since the epoch.
        alive: whether a process of the job is at work, whatever Ray says.
        fits: whether the cluster has room for it.
        max_attempts: that may end in a row without a step of progress.
        parents: the jobs that it comes after; None: not in the table any more.
    """
    if row.state in SETTLED:
        return Decision("none", row.state)
    at_work = alive or ray in ("PENDING", "RUNNING")
    if row.state == "QUEUED" and row.held:
        if ended := lost(parents):
            return Decision("finish", "FAILED", *ended)
        if open_ := waits_for(parents):
            return Decision("none", "QUEUED", waiting(open_))
        return Decision("check", "QUEUED")
    if row.state == "QUEUED":
        return Decision("submit", "STARTING") if fits and not at_work else Decision("none", "QUEUED")

    if record is not None and record.state == "SUCCEEDED":
        return Decision("finish", "SUCCEEDED")
    if record is not None and record.state == "FAILED" and record.attempt >= row.attempt:  # else it was resumed since
        return Decision("finish", "FAILED", record.reason, record.hint)

    if row.state == "CANCELLING":
        if not at_work:
            return Decision("finish", "CANCELLED", "cancelled on request")
        return Decision("stop", "CANCELLING")
    if row.state == "PAUSING":
        return Decision("stop", "PAUSING") if at_work else Decision("none", "PAUSED", "paused on request")
    if at_work:
        running = record is not None and record.state == "RUNNING" and record.attempt == row.attempt
        return Decision("none", "RUNNING" if running else row.state)
    if row.origin == "ray" and ray == "STOPPED":
        return Decision("finish", "CANCELLED", "stopped by `ray job stop`")
    if ray is None and (record is None or record.attempt < row.attempt):
        return Decision("resubmit", "STARTING")
    if row.stalled + 1 >= max_attempts:
        reason = f"ended {max_attempts} times in a row without a step of progress and without giving a reason"
        return Decision("finish", "FAILED", reason, "its log has the last words of the process")
    if row.stalled and now < (row.submitted_at or 0.0) + min(MAX_BACKOFF_S, 2.0**row.stalled):
        return Decision("none", row.state)
    return Decision("submit", "STARTING")


def _stands(job: Job, decision: Decision, record: Record | None) -> bool:
    """Whether the row says already what is true: a check that passed lets go of a job that was held."""
    seen = record is None or record.attempt != job.attempt
    progress = None if record is None else (record.step, record.epoch, record.total_steps)
    known = seen or (progress == (job.step, job.epoch, job.total_steps) and job.started_at is not None)
    same = (job.state, job.reason, job.hint) == (decision.state, decision.reason, decision.hint)
    return known and same and decision.act != "check"


def _spoke(job: Job, record: Record | None) -> bool:
    """Whether the run said how its newest attempt ended."""
    return record is not None and record.attempt >= job.attempt and record.state not in ("STARTING", "RUNNING")


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
        """
        self._check, self._releases = check, releases
        self._settings, self._store, self._ray, self._registry = settings, store, ray, registry
        self._deployments, self._clock = deployments, clock
        self._unreadable: set[str] = set()  # run folders that are none, said once
        self._wake = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        self.ray_error: str | None = "Ray has not been asked yet"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._wake.set()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        """Something changed: look now."""
        self._wake.set()

    def _run(self) -> None:
        while not self._done.is_set():
            self._wake.clear()
            try:
                self.round()
            except Exception:
                logger.exception("a round of the reconciler failed; the next one tries again")
            if self._wake.wait(self._settings.reconcile_interval_s):
                self._done.wait(GATHER_S)

    def round(self) -> None:
        """Looks at every unfinished job once."""
        try:
            statuses = self._ray.statuses()
            capacity = self._ray.capacity()
        except Unavailable as error:
            self.ray_error = error.detail
            return
        self.ray_error = None
        self._adopt()
        with self._store.session() as session:
            place = sa.func.coalesce(Job.resumed_at, Job.created_at), Job.number
            jobs = list(session.scalars(sa.select(Job).where(Job.state.not_in(SETTLED)).order_by(*place)))
            named = {parent for job in jobs if job.held for parent in job.after}
            of_parents = sa.select(Job.id, Job.state).where(Job.id.in_(named))
            states = {job_id: state for job_id, state in session.execute(of_parents)} if named else {}
        free = {
            "CPU": capacity["CPU"] - sum(job.cpus for job in jobs if job.state in ACTIVE),
            "GPU": capacity["GPU"] - sum(job.gpus for job in jobs if job.state in ACTIVE),
        }
        behind = False  # first come, first served: nobody overtakes a job that waits for room
        for job in jobs:
            fits = not behind and job.cpus <= free["CPU"] and job.gpus <= free["GPU"]
            if job.state == "QUEUED" and not job.held:
                behind = behind or not fits
            try:
                parents = {parent: states.get(parent) for parent in job.after}
                ray = statuses.get(submission_id(job.id, job.attempt))
                if self._settle(job, ray, fits, parents) and job.state == "QUEUED":
                    free = {"CPU": free["CPU"] - job.cpus, "GPU": free["GPU"] - job.gpus}
            except StaleDataError:
                logger.info("job %s changed meanwhile; looked at again in the next round", job.id)
            except (ServiceError, ValueError, OSError) as error:
                logger.warning("job %s: %s; tried again in the next round", job.id, error)
        self._deployments()

    def _settle(self, job: Job, ray: RayStatus | None, fits: bool, parents: Mapping[str, JobState | None]) -> bool:
        """Decides and acts for one job; True when it was submitted."""
        if is_deploy(job.spec):
            self._write(job, self._releases.settle(job, parents), None)
            return False
        run = RunFolder(self._settings.runs / job.id)
        record = run.read_record()
        now = self._clock()
        alive = lives(record, now)
        most = self._settings.max_attempts
        decision = decide(job, ray, record, now, alive=alive, fits=fits, max_attempts=most, parents=parents)
        if job.state in ACTIVE and (decision.act == "submit" or decision.state == "FAILED") and not _spoke(job, record):
            self._keep_last_words(job, run)
        if decision.act in ("submit", "resubmit"):
            self._submit(job, run, again=decision.act == "resubmit")
        elif decision.act == "stop":
            run.stop.touch()
            self._ray.stop(job.id, job.attempt)
        elif decision.act == "finish" and decision.state == "SUCCEEDED":
            self._register(job, run)
        elif decision.act == "check" and (problems := self._check(parse_spec(job.spec), self._settings.home)):
            decision = Decision("finish", "FAILED", problems[0].sentence, problems[0].hint)
        self._write(job, decision, record)
        return decision.act in ("submit", "resubmit")

    def _submit(self, job: Job, run: RunFolder, *, again: bool) -> None:
        """Writes the attempt into the row, then asks Ray: a crash in between is a `resubmit` of the same attempt."""
        if not again:
            with self._store.session() as session:
                row = session.get(Job, job.number, with_for_update=True)
                assert row is not None
                if row.revision != job.revision:
                    raise StaleDataError(job.id)
                # out of the queue comes who had no attempt yet, or whose attempt ended on request
                row.stalled = row.stalled + 1 if row.state != "QUEUED" and row.step <= row.best_step else 0
                row.best_step = max(row.best_step, row.step)
                row.attempt += 1
                row.become("STARTING", f"attempt {row.attempt}")
                row.submitted_at = self._clock()
                session.flush()
                job.revision, job.attempt, job.stalled = row.revision, row.attempt, row.stalled
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomic(run.spec, parse_spec(job.spec).model_dump_json(indent=1))
        run.stop.unlink(missing_ok=True)
        logger.info("job %s: attempt %d is submitted", job.id, job.attempt)
        self._ray.submit(job.id, job.attempt)

    def _keep_last_words(self, job: Job, run: RunFolder) -> None:
        """What a process printed that could not say why it ended goes into the log: Ray's own is lost with its head."""
        title = f"attempt {job.attempt} ended without giving a reason; what its process printed last:"
        try:
            words = self._ray.log_tail(job.id, job.attempt)[-LAST_WORDS:]
            if not words or title in part(run.log, None, 4 * LAST_WORDS, Wanted())[0]:
                return  # it was said, and the service died before it had written the row
            run.path.mkdir(parents=True, exist_ok=True)
            append(run.log, logger.name, f"{title}\n{words}")
        except (ServiceError, OSError) as error:  # no reason to keep the job from its next attempt
            logger.warning("job %s: the last words of attempt %d are not kept: %s", job.id, job.attempt, error)

    def _register(self, job: Job, run: RunFolder) -> None:
        """Registers what the job left, before its row says SUCCEEDED."""
        name = job.spec.get("register")
        if name is not None:
            self._registry.register(name, run.artifact, job.id, "artifact")
        for result in run.read_evaluations():
            if "register" in result:
                self._registry.register(result["register"], run.path / result["artifact"], job.id, result["artifact"])

    def _write(self, job: Job, decision: Decision, record: Record | None) -> None:
        """Puts what is true into the row, if it changed: for most of a long queue that costs nothing."""
        if _stands(job, decision, record):
            return
        with self._store.session() as session:
            row = session.get(Job, job.number)
            assert row is not None
            if row.revision != job.revision:
                raise StaleDataError(job.id)  # a cancel came in between
            if row.state != decision.state:
                row.become(decision.state, decision.reason or f"attempt {row.attempt}")
            row.reason, row.hint = decision.reason, decision.hint
            if decision.act == "check":
                row.held = False
                self._wake.set()  # it is submitted in the next round
            if record is not None and record.attempt == row.attempt:
                row.step, row.epoch, row.total_steps = record.step, record.epoch, record.total_steps
                row.started_at = row.started_at or record.started_at
            if decision.state == "RUNNING":
                row.started_at = row.started_at or self._clock()
            if decision.state in TERMINAL:
                row.finished_at = (record.finished_at if record else None) or self._clock()
                logger.info("job %s: %s %s", job.id, decision.state, decision.reason or "")

    def _adopt(self) -> None:
        """Rows for runs that came by `ray job submit`."""
        if not self._settings.runs.is_dir():
            return
        with self._store.session() as session:
            known = set(session.scalars(sa.select(Job.id)))
        for path in sorted(self._settings.runs.iterdir()):
            if path.name in known or path.name in self._unreadable:
                continue
            run = RunFolder(path)
            try:
                record = run.read_record()
                if record is None or not run.spec.exists():
                    continue  # no run yet, or none at all
                spec = spec_of(run)
            except (ValueError, OSError) as error:  # one such folder must not keep the others from their round
                logger.warning("%s is not followed: %s", path, error)
                self._unreadable.add(path.name)
                continue
            job = Job(
                id=path.name,
                name=spec.name,
                spec=spec.model_dump(mode="json"),
                origin="ray",
                attempt=record.attempt,
                created_at=record.started_at,
                cpus=spec.resources.cpus,
                gpus=spec.resources.gpus,
            )
            job.become("STARTING", "came by `ray job submit`")
            with self._store.session() as session:
                session.add(job)
            logger.info("job %s came by Ray and is followed from now on", path.name)
