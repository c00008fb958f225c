"""What happens to a run at the ends of an attempt: it is submitted, its last words are kept, its models registered."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy.orm.exc import StaleDataError

from service.decisions import reached, stalled_after
from service.errors import ServiceError
from service.logs import Wanted, part
from service.ray_jobs import RayJobs
from service.registry import Registry
from service.store import Job, Store
from workloads import tracing
from workloads.log_file import append
from workloads.record import Record, RunFolder, write_atomic
from workloads.spec_any import parse_spec

logger = logging.getLogger(__name__)

LAST_WORDS = 1 << 14  # characters


class Attempts:
    """Of jobs whose reconciler has decided."""

    def __init__(self, store: Store, ray: RayJobs, registry: Registry, clock: Callable[[], float]) -> None:
        self._store, self._ray, self._registry, self._clock = store, ray, registry, clock

    def submit(self, job: Job, run: RunFolder, record: Record | None, *, again: bool) -> None:
        """Writes the attempt into the row, then asks Ray: a crash in between is a submission of the same attempt.

        Args:
            job: a row as it was read; its attempt and revision are brought up to date.
            run: of the job.
            record: of its run, if there is one.
            again: the attempt is in the row, and Ray has not heard of it.

        Raises:
            StaleDataError: the row changed meanwhile.
            Unavailable: Ray does not answer.
        """
        if not again:
            with self._store.session() as session:
                row = session.get(Job, job.number, with_for_update=True)
                assert row is not None
                if row.revision != job.revision:
                    raise StaleDataError(job.id)
                # out of the queue comes who had no attempt yet, or whose attempt ended on request
                row.stalled = 0 if row.state == "QUEUED" else stalled_after(row, record)
                row.best_step = max(row.best_step, reached(row, record))
                row.attempt += 1
                row.become("STARTING", f"attempt {row.attempt}")
                row.submitted_at = self._clock()
                session.flush()
                job.revision, job.attempt, job.stalled = row.revision, row.attempt, row.stalled
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomic(run.spec, parse_spec(job.spec).model_dump_json(indent=1))
        run.stop.unlink(missing_ok=True)
        logger.info("job %s: attempt %d is submitted", job.id, job.attempt)
        told = {"manta.job.id": job.id, "manta.job.attempt": job.attempt}
        with tracing.span("submit attempt", told, parent=job.traceparent):
            self._ray.submit(job.id, job.attempt)

    def keep_last_words(self, job: Job, run: RunFolder) -> None:
        """What a process printed that could not say why it ended goes into the log: Ray's own is lost with its head.

        Of that, what is not in the log already; nothing where all is, as after a crash of the service at this place.
        """
        title = f"attempt {job.attempt} ended without giving a reason; what its process printed last:"
        try:
            words = self._ray.log_tail(job.id, job.attempt)[-LAST_WORDS:].splitlines()
            known, _ = part(run.log, None, 4 * LAST_WORDS, Wanted())
            if fresh := [line for line in words if line.strip() not in known]:
                run.path.mkdir(parents=True, exist_ok=True)
                append(run.log, logger.name, "\n".join([title, *fresh]))
        except (ServiceError, OSError) as error:  # no reason to keep the job from its next attempt
            logger.warning("job %s: the last words of attempt %d are not kept: %s", job.id, job.attempt, error)

    def register(self, job: Job, run: RunFolder) -> None:
        """Registers what the job left, before its row says SUCCEEDED."""
        name = job.spec.get("register")
        if name is not None:
            self._registry.register(name, run.artifact, job.id, "artifact")
        for result in run.read_evaluations():
            if "register" in result:
                self._registry.register(result["register"], run.path / result["artifact"], job.id, result["artifact"])
