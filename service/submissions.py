"""Accepts jobs: one, a list, a changed copy; or only says what they would do.

A row is written before anything else happens: what was answered is never lost.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.dependencies import named, waiting, waits_for
from service.documents import expect_short
from service.errors import Conflict, InvalidSpec
from service.forecast import forecast, step_time, workload
from service.jobs import Jobs
from service.patches import merged
from service.principal import DEFAULT_PROJECT, LOCAL, Principal
from service.projects import expect_room
from service.queue import RANKS
from service.settings import Settings
from service.store import Job, Store
from service.validation import Validation, claim_names
from workloads import preflight, tracing
from workloads.spec_any import AnySpec
from workloads.spec_deploy import DeploySpec


class Submissions:
    """New rows of the table of jobs."""

    def __init__(
        self, settings: Settings, store: Store, jobs: Jobs, validation: Validation, wake: Callable[[], None]
    ) -> None:
        """Keeps its parts.

        Args:
            settings: of the service.
            store: the database.
            jobs: that are there.
            validation: what is wrong with a job.
            wake: tells the reconciler that there is something to do.
        """
        self._settings, self._store, self._jobs, self._wake = settings, store, jobs, wake
        self._validation = validation

    def submit(
        self,
        body: dict[str, Any],
        idempotency_key: str | None = None,
        by: Principal = LOCAL,
        project: str = DEFAULT_PROJECT,
        asked: Any = None,
    ) -> tuple[Job, bool]:
        """Accepts a job: its row is durable when this returns. False when the key had made it before.

        Args:
            body: a JobSpec.
            idempotency_key: of the project.
            by: whose job it is.
            project: whose, too; one that `by` may submit to.
            asked: what the key stands for, where that is not the body.

        Raises:
            InvalidSpec: every problem that can be found without running it.
            Conflict: the key was used for another body.
            TooMany: its project has as many unfinished jobs as it may.
            TooLarge: it is a long document.
        """
        with tracing.span("submit job", {"manta.project": project}) as span:
            jobs, created = self._accept([body], [idempotency_key], asked or body, by, project)
            if span is not None:
                span.set_attribute("manta.job.id", jobs[0].id)
        return jobs[0], created

    def submit_all(
        self,
        bodies: Sequence[dict[str, Any]],
        idempotency_key: str | None = None,
        by: Principal = LOCAL,
        project: str = DEFAULT_PROJECT,
    ) -> tuple[list[Job], bool]:
        """Accepts a list of jobs, all or none; a later one names an earlier one as `$name` (`service.dependencies`).

        Raises:
            InvalidSpec: every problem of every job; `loc` begins with `jobs` and the number of the job.
            Conflict: the key was used for another list.
        """
        keys = [None if idempotency_key is None else f"{idempotency_key}/{i}" for i in range(len(bodies))]
        with tracing.span("submit jobs", {"manta.project": project, "manta.jobs": len(bodies)}):
            return self._accept(bodies, keys, bodies, by, project)

    def _accept(
        self, bodies: Sequence[dict[str, Any]], keys: Sequence[str | None], asked: Any, by: Principal, project: str
    ) -> tuple[list[Job], bool]:
        """Rows for the bodies, or the rows that the keys had made before."""
        expect_short(bodies)
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if known := self._by_keys(project, keys, digest):
            return known, False
        ids = [f"job-{uuid.uuid4().hex[:12]}" for _ in bodies]
        jobs = self._rows(named(bodies, ids), ids, by, project)
        for job, key in zip(jobs, keys, strict=True):
            job.idempotency_key, job.body_hash, job.traceparent = key, digest, tracing.traceparent()
        try:
            with self._store.session() as session:
                for job in jobs:
                    session.add(job)
                    session.flush()  # numbers in this order
                expect_room(session, project)
                claim_names(session, [job.spec for job in jobs], project)
        except IntegrityError:  # the same key at the same moment
            if known := self._by_keys(project, keys, digest):
                return known, False
            raise
        self._wake()
        return jobs, True

    def _rows(self, documents: Sequence[dict[str, Any]], ids: Sequence[str], by: Principal, project: str) -> list[Job]:
        """Each job as a new row; those before it in the list may be among what it comes after."""
        jobs: dict[str, Job] = {}
        problems: list[dict[str, Any]] = []
        for i, (document, job_id) in enumerate(zip(documents, ids, strict=True)):
            place = ["jobs", i] if len(documents) > 1 else []
            try:
                spec, parents = self._validation.valid(document, by, project, jobs)
            except InvalidSpec as error:
                problems += [problem | {"loc": [*place, *problem["loc"]]} for problem in error.problems]
                continue
            held = waits_for(parents)
            jobs[job_id] = Job(
                id=job_id,
                name=spec.name,
                spec=spec.model_dump(mode="json"),
                after=list(parents),
                held=bool(held),
                reason=waiting(held) if held else None,
                project=project,
                owner=by.name,
                origin="rest",
                **({} if isinstance(spec, DeploySpec) else _asked(spec)),
            )
            jobs[job_id].become("QUEUED", waiting(held) if held else "accepted")
        if problems:
            raise InvalidSpec(problems)
        return [*jobs.values()]

    def _by_keys(self, project: str, keys: Sequence[str | None], digest: str) -> list[Job]:
        """The jobs that the keys made, in their order; [] where they are new.

        One statement, so that a list which is stored at this moment is seen as a whole or not at all.
        """
        wanted = [key for key in keys if key is not None]
        if not wanted:
            return []
        with self._store.session() as session:
            query = sa.select(Job).filter_by(project=project).where(Job.idempotency_key.in_(wanted))
            found = {job.idempotency_key: job for job in session.scalars(query)}
        jobs = [found[key] for key in wanted if key in found]
        for job in jobs:
            if job.body_hash != digest:
                detail = f"Idempotency-Key {job.idempotency_key!r} made {job.id} from another body"
                raise Conflict(detail, "use a new key for a new job")
        return jobs

    def clone(
        self, job_id: str, patch: dict[str, Any], idempotency_key: str | None = None, by: Principal = LOCAL
    ) -> tuple[Job, bool]:
        """Accepts a new job of the same project, the spec of this one changed by a merge patch; answers as `submit`."""
        job = self._jobs.get(job_id)
        return self.submit(merged(job.spec, patch), idempotency_key, by, job.project, {"of": job_id, "patch": patch})

    def dry_run(
        self, body: dict[str, Any], by: Principal = LOCAL, project: str = DEFAULT_PROJECT, gpu: str | None = None
    ) -> dict[str, Any]:
        """What the job would do and cost; nothing is stored.

        Args:
            body: a JobSpec, or a SearchSpec.
            by: who asks.
            project: in which it would run.
            gpu: by whose peak the time is told where no run of the same shape tells it.

        Raises:
            InvalidSpec: as `submit`, and what a look at the data finds.
            TooMany: the project has no room for the job now.
        """
        from workloads.dry_run import Refused, dry_run

        expect_short([body])
        (document,) = named([body], [""])
        spec, parents = self._validation.valid(document, by, project, {})
        if isinstance(spec, DeploySpec):
            message = f"got a deployment of {spec.deploy.model}, which computes nothing, expected a job that does"
            raise InvalidSpec([preflight.Problem(loc=["deploy"], message=message, hint="submit it").model_dump()])
        if held := waits_for(parents):
            message = f"got a job that {waiting(held)}, whose results a dry run would need, expected finished ones"
            raise InvalidSpec([preflight.Problem(loc=["after"], message=message, hint="ask then").model_dump()])
        with self._store.session() as session:
            expect_room(session, project, more=1)
        try:
            costs = dry_run(spec, self._settings.home)
        except Refused as error:
            raise InvalidSpec([error.problem.model_dump()]) from error
        measured = step_time(self._store, self._settings, spec, by.project)
        return forecast(spec, costs.model_dump(mode="json"), measured, gpu)


def _asked(spec: AnySpec) -> dict[str, Any]:
    """What the queue goes by."""
    resources = spec.resources
    needs = {"cpus": resources.cpus, "gpus": resources.gpus, "custom": resources.custom}
    return needs | {"most_gpus": resources.most_gpus, "rank": RANKS[spec.priority], "workload": workload(spec)}
