"""What users do with jobs: submit, look, pause, resume, cancel. Their life after that is `service.reconciler`.

    QUEUED -> STARTING -> RUNNING -> SUCCEEDED | FAILED
       |         |           |
       |         +-----------+--> CANCELLING -> CANCELLED
       |         +-----------+--> PAUSING ----> PAUSED -> QUEUED   (a job that finishes first has finished)
       +--> PAUSED | CANCELLED

`service.transitions` has what each request makes of each state.

A row is written before anything else happens. Times in answers are ISO 8601 in UTC.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError

from service.dependencies import lost, named, references, waiting, waits_for
from service.errors import Conflict, InvalidSpec, NotFound, Unavailable
from service.events import START, read_events
from service.forecast import forecast, step_time
from service.patches import differences, merged
from service.principal import ALL, DEFAULT_PROJECT, LOCAL, Principal
from service.ray_jobs import RayJobs
from service.registry import Registry
from service.roots import ANY, Kind, Roots
from service.settings import Settings
from service.store import SETTLED, TERMINAL, Job, JobState, Store
from service.transitions import CANCEL, LENGTHEN, LENGTHEN_ENDED, PAUSE, RESUME, RETRY, Request
from workloads import preflight
from workloads.catalog import problems_of
from workloads.record import RunFolder
from workloads.spec_any import AnySpec, kind_of
from workloads.winner import read_found


class Jobs:
    """The table of jobs as users see it."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        ray: RayJobs,
        registry: Registry,
        wake: Callable[[], None],
        check: preflight.Check = preflight.check,
    ) -> None:
        """Keeps its parts.

        Args:
            settings: of the service.
            store: the database.
            ray: asked for the size of the cluster.
            registry: asked for what a job registered.
            wake: tells the reconciler that there is something to do.
            check: what is wrong with a spec.
        """
        self._settings, self._store, self._ray, self._registry = settings, store, ray, registry
        self._wake, self._check = wake, check

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
        """
        jobs, created = self._accept([body], [idempotency_key], asked or body, by, project)
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
        return self._accept(bodies, keys, bodies, by, project)

    def _accept(
        self, bodies: Sequence[dict[str, Any]], keys: Sequence[str | None], asked: Any, by: Principal, project: str
    ) -> tuple[list[Job], bool]:
        """Rows for the bodies, or the rows that the keys had made before."""
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if known := self._by_keys(project, keys, digest):
            return known, False
        ids = [f"job-{uuid.uuid4().hex[:12]}" for _ in bodies]
        jobs = self._rows(named(bodies, ids), ids, by, project)
        for job, key in zip(jobs, keys, strict=True):
            job.idempotency_key, job.body_hash = key, digest
        try:
            with self._store.session() as session:
                for job in jobs:
                    session.add(job)
                    session.flush()  # numbers in this order
        except IntegrityError:  # the same key at the same moment
            if known := self._by_keys(project, keys, digest):
                return known, False
            raise
        self._wake()
        return jobs, True

    def _rows(self, documents: Sequence[dict[str, Any]], ids: Sequence[str], by: Principal, project: str) -> list[Job]:
        """Each job as a new row; those before it in the list may be among what it comes after."""
        jobs: dict[str, Job] = {}
        specs, problems = [], []
        for i, (document, job_id) in enumerate(zip(documents, ids, strict=True)):
            place = ["jobs", i] if len(documents) > 1 else []
            try:
                spec, parents = self._valid(document, by, project, jobs)
            except InvalidSpec as error:
                problems += [problem | {"loc": [*place, *problem["loc"]]} for problem in error.problems]
                continue
            held = waits_for(parents)
            specs.append(spec)
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
                cpus=spec.resources.cpus,
                gpus=spec.resources.gpus,
            )
            jobs[job_id].become("QUEUED", waiting(held) if held else "accepted")
        for spec in () if problems else specs:  # a list that is refused claims no name
            problems += [problem.model_dump() for problem in self._taken(spec, project, claim=True)]
        if problems:
            raise InvalidSpec(problems)
        return [*jobs.values()]

    def _by_keys(self, project: str, keys: Sequence[str | None], digest: str) -> list[Job]:
        """The jobs that the keys made, in their order; [] where they are new."""
        found = [self._by_key(project, key, digest) for key in keys if key is not None]
        return [job for job in found if job is not None]

    def _by_key(self, project: str, key: str, digest: str) -> Job | None:
        with self._store.session() as session:
            job = session.scalar(sa.select(Job).filter_by(project=project, idempotency_key=key))
        if job is not None and job.body_hash != digest:
            raise Conflict(f"Idempotency-Key {key!r} made {job.id} from another body", "use a new key for a new job")
        return job

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
        """
        from workloads.dry_run import Refused, dry_run

        (document,) = named([body], [""])
        spec, parents = self._valid(document, by, project, {})
        if held := waits_for(parents):
            message = f"got a job that {waiting(held)}, whose results a dry run would need, expected finished ones"
            raise InvalidSpec([preflight.Problem(loc=["after"], message=message, hint="ask then").model_dump()])
        try:
            costs = dry_run(spec, self._settings.home)
        except Refused as error:
            raise InvalidSpec([error.problem.model_dump()]) from error
        measured = step_time(self._store, self._settings, spec, by.project)
        return forecast(spec, costs.model_dump(mode="json"), measured, gpu)

    def _valid(
        self, body: dict[str, Any], by: Principal, project: str, siblings: Mapping[str, Job]
    ) -> tuple[AnySpec, dict[str, JobState | None]]:
        """The spec, and what it comes after; `siblings`: jobs of the same list that are not in the table yet."""
        kind = kind_of(body)
        try:
            spec = kind.model_validate(body)
        except ValidationError as error:
            found = problems_of(error, kind)
            raise InvalidSpec([{"loc": list(loc), "message": text, "hint": ""} for loc, text in found]) from None
        parents: dict[str, JobState | None] = {}
        problems = _unfit_for_a_service(spec) or self._not_allowed(spec, by, siblings)  # before what it names is opened
        if not problems:
            parents = self._parents(spec, project, siblings)
            checked = preflight.form(spec) if waits_for(parents) else self._check(spec, self._settings.home)
            problems = checked or self._too_large(spec) or self._taken(spec, project, claim=False)
        if problems:
            raise InvalidSpec([problem.model_dump() for problem in problems])
        return spec, parents

    def _parents(self, spec: AnySpec, project: str, siblings: Mapping[str, Job]) -> dict[str, JobState | None]:
        """States of the jobs that it comes after; what it names as `job:<id>` and has ended is for `preflight`.

        Raises:
            NotFound: the project has no such job.
            InvalidSpec: one of them will not succeed.
        """
        parents: dict[str, JobState | None] = {}
        for job_id in (*spec.after, *references(spec)):
            job = siblings.get(job_id) or self.find(job_id)
            if job_id in spec.after:
                if job is None or job.project != project:
                    raise no_such_job(job_id)
            elif job is None or job.state in TERMINAL:
                continue
            parents[job_id] = job.state
        if ended := lost(parents):
            raise InvalidSpec([preflight.Problem(loc=["after"], message=f"got {ended[0]}", hint=ended[1]).model_dump()])
        return parents

    def _not_allowed(self, spec: AnySpec, by: Principal, siblings: Mapping[str, Job]) -> list[preflight.Problem]:
        """Paths outside of the roots, and weights of projects that `by` does not see."""
        roots = self._settings.allowed_roots
        if roots is None and by == LOCAL:
            roots = (ANY,)

        def readable(kind: Kind, name: str) -> bool:
            if by.project == ALL or name in siblings:
                return True
            row = self.find(name) if kind == "job" else self._registry.owner(name)
            return kind == "model" if row is None else by.sees(row.project)  # else a name of public weights

        return Roots(roots, self._settings.home).problems(spec, readable)

    def _taken(self, spec: AnySpec, project: str, claim: bool) -> list[preflight.Problem]:
        """Names in the registry that another project has; with `claim` the others are its own from now on."""
        document = spec.model_dump()
        names = [holder.get("register") for holder in (document, *document.get("evaluate", []))]
        look = self._registry.claim if claim else self._registry.taken
        taken = look([name for name in names if name is not None], project)
        message = f"got {', '.join(taken)}, which another project has in the registry"
        return [preflight.Problem(loc=["register"], message=message, hint="choose another name")] if taken else []

    def _too_large(self, spec: AnySpec) -> list[preflight.Problem]:
        """A job that the cluster could not hold even when empty; nothing is said while Ray is away."""
        try:
            capacity = self._ray.capacity()
        except Unavailable:
            return []
        resources = spec.resources
        needs = (("CPU", resources.cpus, resources.cpus_per_worker), ("GPU", resources.gpus, resources.gpus_per_worker))
        for name, needed, each in needs:
            if needed > capacity[name]:
                workers = int(capacity[name] // each)
                hint = (
                    f"resources.workers: {workers} fits" if workers else f"ask for at most {capacity[name]:g} a worker"
                )
                message = f"got {needed:g} {name}s in all, expected at most the {capacity[name]:g} of this cluster"
                return [preflight.Problem(loc=["resources"], message=message, hint=hint)]
        return []

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
        """
        job = self.get(job_id)
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
            if state == job.state:
                return job
            try:
                with self._store.session() as session:
                    row = session.get(Job, job.number)
                    assert row is not None
                    if row.revision != job.revision:
                        continue
                    row.become(state, request.reason)
                    row.reason, row.hint = (request.reason if state in SETTLED else None), None
                    row.finished_at = _now() if state in TERMINAL else None
                    if state == "QUEUED":
                        row.resumed_at = _now()
                    if max_duration is not None:
                        row.spec = row.spec | {"max_duration": max_duration}
            except StaleDataError:
                continue  # the reconciler wrote at the same moment: look again
            self._wake()
            return self.get(job_id)

    def retry(self, job_id: str) -> Job:
        """Puts a job that failed or was cancelled into the queue, to go on from its checkpoint, if it wrote one.

        Raises:
            Conflict: it succeeded, is paused, or about to stop.
        """
        return self._ask(job_id, RETRY)

    def clone(
        self, job_id: str, patch: dict[str, Any], idempotency_key: str | None = None, by: Principal = LOCAL
    ) -> tuple[Job, bool]:
        """Accepts a new job of the same project, the spec of this one changed by a merge patch; answers as `submit`."""
        job = self.get(job_id)
        return self.submit(merged(job.spec, patch), idempotency_key, by, job.project, {"of": job_id, "patch": patch})

    def diff(self, job_id: str, other_id: str) -> dict[str, Any]:
        """Where the specs of two jobs differ, and what their runs were made of, so far as both have begun."""
        ids = job_id, other_id
        specs = [self.get(name).spec for name in ids]
        folders = [self.run_folder(name).provenance for name in ids]
        made_of = [json.loads(path.read_text()) for path in folders if path.exists()]
        return {
            "a": job_id,
            "b": other_id,
            "spec": differences(specs[0], specs[1]),
            "provenance": differences(made_of[0], made_of[1]) if len(made_of) == len(ids) else [],
        }

    def events(self, job_id: str, after: str = START) -> list[dict[str, Any]]:
        """What happened to a job, behind the cursor `after`."""
        return read_events(self._store, self.get(job_id), self.run_folder(job_id), after)

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

    def view(self, job: Job) -> dict[str, Any]:
        """A job as an answer."""
        run = RunFolder(self._settings.runs / job.id)
        record = run.read_record()
        kind = "search" if "search" in job.spec else "method"
        found = read_found(run.artifact) if kind == "search" else None
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
            **dict.fromkeys(("method", "search")),
            kind: job.spec[kind]["name"],
            "origin": job.origin,
            "created_at": _iso(job.created_at),
            "started_at": _iso(job.started_at),
            "finished_at": _iso(job.finished_at),
            "progress": {"step": job.step, "total_steps": job.total_steps, "epoch": job.epoch},
            "ran_s": record.ran_s if record else 0.0,
            "skipped": record.skipped if record else [],
            "warnings": record.warnings if record else [],
            "evaluations": run.read_evaluations(),
            "models": self._registry.of_job(job.id),
            "found": found.summary() if found else None,
            "spec": job.spec,
        }


def no_such_job(job_id: str) -> NotFound:
    return NotFound(f"got job {job_id!r}, which does not exist", "GET /v1/jobs lists them")


def _unfit_for_a_service(spec: AnySpec) -> list[preflight.Problem]:
    """Sources that only a person at a shell may name: relative paths, whose start nobody knows here, and commands."""
    piped = [name for name, stream in spec.data.items() if stream.piped]
    if piped:
        message = "got `pipe:`, whose command would run on the cluster for anybody who may submit, expected files"
        hint = "write the samples to shards, or run the job by `ray job submit` or `manta run --local`"
        return [preflight.Problem(loc=["data", name, "shards"], message=message, hint=hint) for name in piped]
    absolute = spec.absolute(Path("/"))
    message = "got a relative path, expected absolute ones, as the workers see them"
    hint = "`manta submit` makes those of a file absolute"
    fields = ("model", "init", "data", "evaluate", "search")
    found = [name for name in fields if getattr(spec, name, None) != getattr(absolute, name, None)]
    return [preflight.Problem(loc=[name], message=message, hint=hint) for name in found]


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
