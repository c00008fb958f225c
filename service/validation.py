"""What is wrong with a job before it is one: its form, what it may name, what it needs, and what it comes after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.dependencies import lost, references, waits_for
from service.errors import Forbidden, InvalidSpec, NotFound, Unavailable
from service.fitting import misfit
from service.jobs import Jobs, no_such_job
from service.principal import ALL, LOCAL, Principal
from service.projects import Projects
from service.ray_jobs import RayJobs
from service.registry import Registry, claim
from service.releases import Releases, makers, nothing_to_deploy
from service.roots import ANY, Kind, Roots
from service.seen_nodes import SeenNodes
from service.settings import Settings
from service.store import TERMINAL, Job, JobState
from workloads import preflight
from workloads.catalog import problems_of
from workloads.spec_any import AnySpec, kind_of
from workloads.spec_deploy import DeploySpec, is_deploy

Entry = AnySpec | DeploySpec  # of a submitted list


class Validation:
    """Says everything that can be found without running a job."""

    def __init__(
        self,
        settings: Settings,
        jobs: Jobs,
        ray: RayJobs,
        seen: SeenNodes,
        registry: Registry,
        projects: Projects,
        releases: Releases,
        check: preflight.Check = preflight.check,
    ) -> None:
        """Keeps its parts.

        Args:
            settings: of the service.
            jobs: that a job may name.
            ray: asked for the nodes of the cluster.
            seen: asked for those that it lately had.
            registry: asked for whose a name is.
            projects: asked for quotas.
            releases: asked for what a deploy entry means.
            check: what is wrong with a spec.
        """
        self._settings, self._jobs, self._ray, self._seen, self._registry = settings, jobs, ray, seen, registry
        self._projects, self._releases, self._check = projects, releases, check

    def valid(
        self, body: dict[str, Any], by: Principal, project: str, siblings: Mapping[str, Job]
    ) -> tuple[Entry, dict[str, JobState | None]]:
        """The spec, and what it comes after; `siblings`: jobs of the same list that are not in the table yet."""
        if is_deploy(body):
            return self._deployable(body, by, project, siblings)
        kind = kind_of(body)
        try:
            spec = kind.model_validate(body)
        except ValidationError as error:
            found = problems_of(error, kind)
            raise InvalidSpec([{"loc": list(loc), "message": text, "hint": ""} for loc, text in found]) from None
        parents: dict[str, JobState | None] = {}
        # before what it names is opened
        problems = _unfit_for_a_service(spec) or _too_urgent(spec, by) or self._not_allowed(spec, by, siblings)
        if not problems:
            parents = self._parents(spec, project, siblings)
            checked = preflight.form(spec) if waits_for(parents) else self._checked(spec)
            names = _registers(spec.model_dump())
            problems = checked or self._too_large(spec, project) or self._unclaimable(names, project)
        if problems:
            raise InvalidSpec([problem.model_dump() for problem in problems])
        return spec, parents

    def _deployable(
        self, body: dict[str, Any], by: Principal, project: str, siblings: Mapping[str, Job]
    ) -> tuple[DeploySpec, dict[str, JobState | None]]:
        """`valid` of an entry that deploys; it comes after those that register its model, also where it does not say.

        Raises:
            Forbidden: deploying takes an operator.
        """
        if not by.is_at_least("operator"):
            raise Forbidden(f"got {by.role} {by.name}, expected operator for `deploy`", "leave it out, or ask for one")
        try:
            spec = DeploySpec.model_validate(body)
        except ValidationError as error:
            found = problems_of(error, DeploySpec)
            raise InvalidSpec([{"loc": list(loc), "message": text, "hint": ""} for loc, text in found]) from None
        before = [job for job_id in spec.after if (job := self._jobs.find(job_id)) and job.project == project]
        needed = makers(spec.deploy.model, [*before, *siblings.values()]) if spec.deploy.version is None else []
        if needed:
            after = list(dict.fromkeys((*spec.after, *needed)))
            spec = spec.model_copy(update={"after": after})
        else:
            try:
                spec = spec.model_copy(update={"deploy": self._releases.pinned(spec.deploy, project)})
            except NotFound as error:
                raise InvalidSpec([nothing_to_deploy(error).model_dump()]) from None
        if problems := _taken(self._registry.taken([spec.deploy.model], project)):
            raise InvalidSpec([problem.model_dump() for problem in problems])
        return spec, self._parents(spec, project, siblings)

    def _parents(self, spec: Entry, project: str, siblings: Mapping[str, Job]) -> dict[str, JobState | None]:
        """States of the jobs that it comes after; what it names as `job:<id>` and has ended is for `preflight`.

        Raises:
            NotFound: the project has no such job.
            InvalidSpec: one of them will not succeed.
        """
        parents: dict[str, JobState | None] = {}
        for job_id in (*spec.after, *references(spec)):
            job = siblings.get(job_id) or self._jobs.find(job_id)
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
        roots, mirrors = self._settings.allowed_roots, self._settings.mirror_roots
        if roots is None and by == LOCAL:
            roots, mirrors = (ANY,), (ANY,) if mirrors is None else mirrors

        def readable(kind: Kind, name: str) -> bool:
            if by.project == ALL or name in siblings:
                return True
            row = self._jobs.find(name) if kind == "job" else self._registry.owner(name)
            return kind == "model" if row is None else by.sees(row.project)  # of public weights, or wrong: `preflight`

        return Roots(roots, mirrors, self._settings.home).problems(spec, readable)

    def _unclaimable(self, names: Sequence[str], project: str) -> list[preflight.Problem]:
        """Names in the registry that others have, and new ones by which `init` means weights that timm has."""
        if taken := self._registry.taken(names, project):
            return _taken(taken)
        public = [name for name in names if self._registry.owner(name) is None and preflight.is_public(name)]
        message = f"got {', '.join(public)}, expected a name that timm has no weights of, as `init` means those by it"
        return [preflight.Problem(loc=["register"], message=message, hint="choose another name")] if public else []

    def _checked(self, spec: AnySpec) -> list[preflight.Problem]:
        """What is wrong with a job that needs no other.

        Raises:
            Unavailable: its data is in a store that does not answer now.
        """
        try:
            return self._check(spec, self._settings.home)
        except preflight.NoAnswer as error:
            raise Unavailable(str(error), "nothing is stored; submit it again") from error

    def _too_large(self, spec: AnySpec, project: str) -> list[preflight.Problem]:
        """A job that could never start; nothing is said of the cluster while Ray is away."""
        nodes: list[Mapping[str, float]] = []
        quota, grows = self._projects.quota(project), False
        with suppress(Unavailable):
            hardware = self._ray.hardware()
            nodes, grows = [node.total for node in hardware.nodes], hardware.grows
        found = misfit(spec, nodes, project, quota)
        if found is not None and not grows and len(lately := self._seen.most()) > len(nodes):
            found = misfit(spec, lately, project, quota)  # it waits until they are back
        return [] if found is None else [found]


def _too_urgent(spec: AnySpec, by: Principal) -> list[preflight.Problem]:
    """A priority above that of others is not everybody's to take."""
    if spec.priority != "high" or by.is_at_least("operator"):
        return []
    message = f"got high of {by.role} {by.name}, expected normal or low, or an operator of the project"
    return [preflight.Problem(loc=["priority"], message=message, hint="ask one to submit it")]


def claim_names(session: Session, documents: Sequence[Mapping[str, Any]], project: str) -> None:
    """The names in the registry that new jobs give are the project's own from now on, with the transaction.

    Raises:
        InvalidSpec: another project has one.
    """
    names = [name for document in documents for name in _registers(document)]
    if problems := _taken(claim(session, names, project)):
        raise InvalidSpec([problem.model_dump() for problem in problems])


def _taken(names: Sequence[str]) -> list[preflight.Problem]:
    message = f"got {', '.join(names)}, which another project has in the registry"
    return [preflight.Problem(loc=["register"], message=message, hint="choose another name")] if names else []


def _registers(document: Mapping[str, Any]) -> list[str]:
    """Names in the registry that a spec gives."""
    names = [holder.get("register") for holder in (document, *document.get("evaluate", []))]
    return [name for name in names if name is not None]


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
    fields = ("model", "init", "data", "evaluate", "search", "checkpoint")
    found = [name for name in fields if getattr(spec, name, None) != getattr(absolute, name, None)]
    return [preflight.Problem(loc=[name], message=message, hint=hint) for name in found]
