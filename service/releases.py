"""Deployments that stand in a list of jobs: `{name: go-live, deploy: {model: digits}}`.

Such an entry is a job with states, but never one of Ray's: when the jobs before it have succeeded, its model is asked
to be served, and it follows `service.deployments` until the model answers or that has failed. To ask again changes
nothing there, so it does not matter at which moment the service dies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sqlalchemy as sa

from service.decisions import Decision
from service.dependencies import lost, waiting, waits_for
from service.deployments import Deployments
from service.errors import NotFound
from service.registry import Registry
from service.store import SETTLED, Deployment, Job, JobState, ModelVersion, Store
from workloads.preflight import Problem
from workloads.spec_deploy import Deploy


def decide(
    row: Job, version: int | None, served: Deployment | None, parents: Mapping[str, JobState | None]
) -> Decision:
    """What is true of the entry, and what to do: `submit` asks for the deployment.

    Args:
        row: our row.
        version: that it means; None: there is none.
        served: the row of its model in the table of deployments.
        parents: the jobs that it comes after; None: not in the table any more.
    """
    if row.state in SETTLED:
        return Decision("none", row.state)
    name = row.spec["deploy"]["model"]
    if row.state == "QUEUED" and row.held:
        if ended := lost(parents):
            return Decision("finish", "FAILED", *ended)
        open_ = waits_for(parents)
        return Decision("none", "QUEUED", waiting(open_)) if open_ else Decision("check", "QUEUED")
    if row.state == "CANCELLING":
        return Decision("finish", "CANCELLED", f"cancelled on request; {name} is served as far as it has come")
    if row.state == "PAUSING":
        return Decision("none", "PAUSED", "paused on request")
    if version is None:
        return Decision(
            "finish", "FAILED", f"nothing before it registered {name}", "GET /v1/models lists what there is"
        )
    if row.state == "QUEUED":
        return Decision("submit", "RUNNING", f"{name}@{version} is being deployed")
    again = f"`manta retry {row.id}` deploys {name}@{version} again"
    if served is None:
        return Decision("finish", "FAILED", f"{name} was undeployed meanwhile", again)
    if served.version != version:
        return Decision(
            "finish", "FAILED", f"{name}@{served.version} was deployed in place of version {version}", again
        )
    if served.state == "FAILED":
        return Decision("finish", "FAILED", f"{name}@{version} could not be deployed: {served.reason}", again)
    if served.state == "RUNNING":
        return Decision("finish", "SUCCEEDED", f"{name}@{version} is served")
    return Decision("none", "RUNNING", f"{name}@{version} is being deployed")


def makers(model: str, jobs: Iterable[Job]) -> list[str]:
    """Ids of those of the jobs that register a version of the model, in their order."""
    return [
        job.id
        for job in jobs
        if any(holder.get("register") == model for holder in (job.spec, *job.spec.get("evaluate", [])))
    ]


class Releases:
    """Says what a deploy entry means, and brings it there."""

    def __init__(self, store: Store, registry: Registry, deployments: Deployments) -> None:
        self._store, self._registry, self._deployments = store, registry, deployments

    def pinned(self, wanted: Deploy, project: str) -> Deploy:
        """The version that there is now, of a model that nothing in the list registers.

        Raises:
            NotFound: the project has no such model, or version.
        """
        owner = self._registry.owner(wanted.model)
        if owner is None or owner.project != project:
            raise self._registry.no_such_model(wanted.model, project)
        return wanted.model_copy(update={"version": self._registry.get(wanted.model, wanted.version).version})

    def settle(self, job: Job, parents: Mapping[str, JobState | None]) -> Decision:
        """Decides, and asks for the deployment."""
        wanted = Deploy.model_validate(job.spec["deploy"])
        version = wanted.version or self._registered(wanted.model, job.after)
        decision = decide(job, version, self._store.get_deployment(wanted.model), parents)
        if decision.act == "submit":
            try:
                self._deployments.deploy(wanted.model, version)
            except NotFound as error:
                return Decision("finish", "FAILED", error.detail, error.hint)
        return decision

    def _registered(self, model: str, job_ids: list[str]) -> int | None:
        """The newest version of the last of the jobs that registered one."""
        query = sa.select(ModelVersion.job_id, sa.func.max(ModelVersion.version)).where(ModelVersion.name == model)
        with self._store.session() as session:
            rows = session.execute(query.group_by(ModelVersion.job_id))
            found = {job_id: version for job_id, version in rows}
        return next((found[job_id] for job_id in reversed(job_ids) if job_id in found), None)


def nothing_to_deploy(error: NotFound) -> Problem:
    """Of an entry whose model is neither registered before it nor in the registry."""
    hint = f"`register` it in an earlier entry of the list; {error.hint}"
    return Problem(loc=["deploy", "model"], message=error.detail, hint=hint)
