"""The objects that live as long as the service, and how routes ask for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.audit import Audit
from service.deliverer import Deliverer
from service.deployments import Deployments
from service.jobs import Jobs
from service.observe.exposition import Exposition
from service.projects import Projects
from service.ray_jobs import RayJobs
from service.reconciler import Reconciler
from service.registry import Registry
from service.releases import Releases
from service.seen_nodes import SeenNodes
from service.settings import Settings
from service.standing import Standing
from service.store import Store
from service.streams import Streams
from service.submissions import Submissions
from service.tokens import Tokens
from service.validation import Validation
from service.webhooks import Webhooks
from workloads import preflight

logger = logging.getLogger(__name__)

DATABASE_S = 120.0  # for which a front end that starts waits for its database: the two may start together


@dataclass
class Parts:
    """Built once in `service.app`; started and stopped with it."""

    settings: Settings
    store: Store
    ray: RayJobs
    registry: Registry
    reconciler: Reconciler
    jobs: Jobs
    submissions: Submissions
    deployments: Deployments
    tokens: Tokens
    projects: Projects
    audit: Audit
    streams: Streams
    webhooks: Webhooks
    deliverer: Deliverer
    exposition: Exposition
    warm: threading.Event = field(default_factory=threading.Event)  # the catalog is imported: the first POST is fast

    def start(self) -> None:
        self.reconciler.start()
        self.deliverer.start()
        threading.Thread(target=self._warm, name="warm-up", daemon=True).start()

    def _warm(self) -> None:
        try:
            preflight.warm()
        except Exception:
            logger.exception("the catalog could not be imported; /readyz stays red")
            return
        self.warm.set()

    def stop(self) -> None:
        self.reconciler.stop()
        self.deliverer.stop()
        self.store.close()


def build_parts(
    settings: Settings,
    *,
    ray: RayJobs | None = None,
    deployments: Deployments | None = None,
    check: preflight.Check = preflight.check,
    clock: Callable[[], float] = time.time,
    wake: Callable[[], None] | None = None,
    checkers: Executor | None = None,
) -> Parts:
    """The parts, wired; what is given stands in for the real one.

    Args:
        settings: of the service.
        ray: the engine.
        deployments: served models.
        check: what is wrong with a spec.
        clock: seconds since the epoch.
        wake: tells the reconciler that there is something to do.
        checkers: run the checks of held jobs.
    """
    store = Store(settings.database, DATABASE_S)
    ray = ray or RayJobs(settings)
    registry = Registry(settings, store)
    deployments = deployments or Deployments(settings, store, registry)
    releases = Releases(store, registry, deployments)
    reconciler = Reconciler(
        settings, store, ray, registry, deployments.reconcile, clock, check, releases=releases, checkers=checkers
    )
    wake = wake or reconciler.wake
    projects = Projects(store)
    jobs = Jobs(settings, store, registry, Standing(store, ray, clock), wake)
    seen = SeenNodes(settings.home, clock)
    validation = Validation(settings, jobs, ray, seen, registry, projects, releases, check)
    tokens = Tokens(store, required=settings.tokens == "required", clock=clock)
    return Parts(
        settings=settings,
        store=store,
        ray=ray,
        registry=registry,
        reconciler=reconciler,
        jobs=jobs,
        submissions=Submissions(settings, store, jobs, validation, wake),
        deployments=deployments,
        tokens=tokens,
        projects=projects,
        audit=Audit(store, clock),
        streams=Streams(jobs, tokens),
        webhooks=Webhooks(settings, store, clock),
        deliverer=Deliverer(settings, store, clock),
        exposition=Exposition(settings, store, reconciler),
    )


# Async although nothing is awaited: a `def` dependency runs in a thread, and each request would pay for the way there.
async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(_parts)]


async def _jobs(parts: PartsDep) -> Jobs:
    return parts.jobs


async def _registry(parts: PartsDep) -> Registry:
    return parts.registry


async def _deployments(parts: PartsDep) -> Deployments:
    return parts.deployments


JobsDep = Annotated[Jobs, Depends(_jobs)]
RegistryDep = Annotated[Registry, Depends(_registry)]
DeploymentsDep = Annotated[Deployments, Depends(_deployments)]
