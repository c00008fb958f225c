"""Which models are served: rows say what is wanted, Ray Serve is brought there.

A row is written before Serve is asked, so whatever restarts, `reconcile` starts what is
missing. This is the one writer of the model applications (`model-<name>`); they are
applications of their own, so a declarative update of the front end leaves them alone.
Several front ends share the rows; each brings the Serve of its own cluster there.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray import serve
from ray.exceptions import RayError
from ray.serve import RunTarget
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from service.errors import NotDeployed, Unavailable
from service.model_views import DeploymentView
from service.predictor import application
from service.registry import Registry
from service.settings import Settings
from service.store import Deployment, DeploymentState, Store

logger = logging.getLogger(__name__)

PREFIX = "model-"
POLL_S = 0.2  # of `wait`
CALM_S = 10.0  # between two looks at Serve while nothing changes here


@dataclass(frozen=True)
class Decision:
    """What to do about a wanted model, and the state that is true."""

    act: Literal["start", "none"]
    state: DeploymentState
    reason: str | None = None


def decide(row: Deployment, app: ApplicationStatusOverview | None, *, asked: int | None) -> Decision:
    """What is true of a wanted model, and what to do.

    Args:
        row: what is wanted, and the state that was seen last.
        app: what Serve says; None: it has no such application.
        asked: the version that this process asked Serve for last. Another one than the row's, or none while it is
            DEPLOYING, may be what the application serves: a process ended, or Serve was away.
    """
    gone = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DELETING)
    other = asked != row.version and (asked is not None or row.state == "DEPLOYING")
    if app is None or app.status in gone or other:
        return Decision("start", "DEPLOYING")
    if app.status in (ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING):
        return Decision("none", "RUNNING" if app.status == ApplicationStatus.RUNNING else "DEPLOYING")
    return Decision("none", "FAILED", reason_of(app))


def view_of(row: Deployment) -> DeploymentView:
    return {"model": f"{row.name}@{row.version}", "state": row.state, "reason": row.reason}


def reason_of(app: ApplicationStatusOverview) -> str:
    """The last line of what Serve says: the exception, without its traceback, process and colours."""
    message = next((d.message for d in app.deployments.values() if d.message), app.message)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", message).strip().splitlines() or [str(app.status.value)]
    return re.sub(r"^([a-z_]\w*\.)+(?=[A-Z]\w*: )", "", lines[-1].strip())


class Deployments:
    """Deploys, replaces and undeploys models, and finds the handle of one that runs."""

    def __init__(self, settings: Settings, store: Store, registry: Registry, serve_api: Any = serve) -> None:
        self._settings, self._store, self._registry, self._serve = settings, store, registry, serve_api
        self._lock = threading.Lock()  # a row, and what Serve was asked for, change together
        self._asked: dict[str, int] = {}  # model -> version that this process asked Serve for; 0: none that counts
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._look_at = 0.0  # monotonic time of the next look at Serve
        self._orphans = True  # there may be applications that nobody wants

    def deploy(self, name: str, version: int | None = None) -> Deployment:
        """Wants `name` served in this version or its newest, and starts that; asking again changes nothing.

        Another version that is served answers until the new one does, and goes on when the new one fails.

        Raises:
            NotFound: the registry has no such model or version.
        """
        version = self._registry.get(name, version).version
        with self._lock:
            row = self._store.get_deployment(name)
            if row is None or row.version != version or row.state == "FAILED":
                self._asked[name] = 0
                row = self._store.put_deployment(name, version, "DEPLOYING", None)
            return self._settle(row, self._applications())

    def undeploy(self, name: str) -> None:
        """Ends the serving of a model; requests that its replica has taken are still answered.

        Raises:
            NotFound: there is no such model.
            NotDeployed: it is not deployed.
        """
        with self._lock:
            self._row(name)
            self._store.delete_deployment(name)
            self._forget(name)
            self._end(name)

    def get(self, name: str) -> Deployment:
        """The row in the state of this moment; raises as `undeploy` does."""
        with self._lock:
            return self._settle(self._row(name), self._applications())

    def wait(self, name: str, timeout_s: float) -> Deployment:
        """`get`, once it is no longer DEPLOYING or the time is over."""
        deadline = time.monotonic() + timeout_s
        while (row := self.get(name)).state == "DEPLOYING" and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return row

    def view(self, name: str) -> DeploymentView | None:
        """The row as it was seen last, None where the model is not deployed."""
        row = self._store.get_deployment(name)
        return None if row is None else view_of(row)

    def reconcile(self) -> None:
        """Starts what is wanted and not there, ends what is there and not wanted, and notes the states."""
        rows = self._store.list_deployments()
        calm = time.monotonic() < self._look_at and all(row.state != "DEPLOYING" for row in rows)
        if calm and not self._orphans and not self._unwanted(rows):
            return
        with self._lock:
            rows = self._store.list_deployments()  # again: one may have come or gone
            for name in self._unwanted(rows):
                self._forget(name)
            apps = self._applications()
            self._orphans, self._look_at = False, time.monotonic() + CALM_S
            for row in rows:
                self._settle(row, apps)
            for name in apps.keys() - {row.name for row in rows}:
                if apps[name].status != ApplicationStatus.DELETING:
                    logger.info("model %s is served, but not wanted: its application is deleted", name)
                    self._orphans = True
                    self._end(name)

    def _unwanted(self, rows: Sequence[Deployment]) -> set[str]:
        """Models of this process without a row: another front end undeployed them."""
        return {*self._asked, *self._handles} - {row.name for row in rows}

    def _forget(self, name: str) -> None:
        self._asked.pop(name, None)
        self._handles.pop(name, None)
        self._orphans = True  # Serve does not say that it has heard of an end: `reconcile` looks

    async def handle(self, name: str) -> DeploymentHandle[Any]:
        """Through which a model that runs is asked.

        Raises:
            NotFound: there is no such model.
            NotDeployed: nobody deployed it, or that failed.
            Unavailable: it is being deployed.
        """
        handle = self._handles.get(name)
        return handle if handle is not None else await asyncio.to_thread(self._find, name)

    def _find(self, name: str) -> DeploymentHandle[Any]:
        with self._lock:
            row = self._settle(self._row(name), self._applications())
            if row.state == "DEPLOYING":
                raise Unavailable(f"{name}@{row.version} is being deployed", "try again in a few seconds")
            if row.state == "FAILED":
                raise NotDeployed(f"{name}@{row.version} could not be deployed: {row.reason}", "deploy another version")
            self._handles[name] = self._serve.get_app_handle(PREFIX + name)
            return self._handles[name]

    def _row(self, name: str) -> Deployment:
        row = self._store.get_deployment(name)
        if row is None:
            self._registry.versions(name)  # says the nearest names where there is none such
            raise NotDeployed(f"got model {name!r}, which is not deployed", f"POST /v1/models/{name}/deploy")
        return row

    def _applications(self) -> dict[str, ApplicationStatusOverview]:
        """What Serve says, by name of the model."""
        try:
            apps = self._serve.status().applications
        except (RayError, RayServeException) as error:
            raise Unavailable(
                f"Ray Serve does not answer: {error}", "try again; `manta doctor` looks closer"
            ) from error
        return {name.removeprefix(PREFIX): app for name, app in apps.items() if name.startswith(PREFIX)}

    def _settle(self, row: Deployment, apps: dict[str, ApplicationStatusOverview]) -> Deployment:
        """Acts on the decision about a row, and writes what changed."""
        decision = decide(row, apps.get(row.name), asked=self._asked.get(row.name))
        if decision.act == "start":
            self._start(row)
        if (row.state, row.reason) == (decision.state, decision.reason):
            return row
        logger.info("model %s@%d: %s %s", row.name, row.version, decision.state, decision.reason or "")
        return self._store.put_deployment(row.name, row.version, decision.state, decision.reason)

    def _end(self, name: str) -> None:
        try:
            self._serve.delete(PREFIX + name, _blocking=False)
        except (RayError, RayServeException) as error:  # `reconcile` asks again
            logger.warning("the application of model %s was not deleted: %s", name, error)

    def _start(self, row: Deployment) -> None:
        """Asks Serve and returns at once; the application of another version is replaced in place."""
        reference = f"{row.name}@{row.version}"
        settings, folder = self._settings, self._registry.folder(row.name, row.version)
        limit, cpus = settings.max_image_pixels, settings.predictor_cpus
        app = application(folder, settings.home, reference, max_pixels=limit, cpus=cpus)
        target = RunTarget(app, name=PREFIX + row.name, route_prefix=None)
        try:
            self._serve.run_many(
                [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
            )
        except (RayError, RayServeException) as error:  # the row stays: `reconcile` asks again
            logger.warning("model %s was not started: %s", reference, error)
            return
        self._asked[row.name] = row.version
