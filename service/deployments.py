"""Which models are served: rows say what is wanted, Ray Serve is brought there.

A row is written before Serve is asked, so whatever restarts, `reconcile` starts what is
missing. This is the one writer of the model applications (`model-<name>`); they are
applications of their own, so a declarative update of the front end leaves them alone.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from typing import Any, Literal

from ray import serve
from ray.serve import RunTarget
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from service.errors import Conflict, NotFound, Unavailable
from service.predictor import application
from service.registry import Registry
from service.settings import Settings
from service.store import Deployment, DeploymentState, Store

log = logging.getLogger(__name__)
PREFIX = "model-"
POLL_S = 0.2


def decide(
    row: Deployment, app: ApplicationStatusOverview | None, *, asked: bool
) -> tuple[Literal["start"], None] | tuple[DeploymentState, str | None]:
    """What to do about a wanted model, or the state and reason that it is in.

    Args:
        row: what is wanted, and the state seen last.
        app: what Serve says; None: nothing of that name.
        asked: whether this process has handed this row to Serve. A DEPLOYING row of a process that
            ended in between may stand beside an application of an older version.
    """
    gone = (None, ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED)
    if app is None or app.status in gone or (row.state == "DEPLOYING" and not asked):
        return "start", None
    if app.status == ApplicationStatus.DEPLOYING:
        return "DEPLOYING", None
    if app.status == ApplicationStatus.RUNNING:
        return "RUNNING", None
    return "FAILED", reason_of(app)


def reason_of(app: ApplicationStatusOverview) -> str:
    """The last line of what Serve says: the exception, without its traceback, process and colours."""
    message = next((d.message for d in app.deployments.values() if d.message), app.message)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", message).strip().splitlines() or [str(app.status.value)]
    return re.sub(r"^([a-z_]\w*\.)+(?=[A-Z]\w*: )", "", lines[-1].strip())


class Deployments:
    """Deploys, replaces and undeploys models, and finds the handle of one that runs."""

    def __init__(self, settings: Settings, store: Store, registry: Registry, serve_api: Any = serve) -> None:
        self._settings, self._store, self._registry, self._serve = settings, store, registry, serve_api
        self._lock = threading.Lock()  # a row and what Serve is asked for change together
        self._asked: dict[str, int] = {}  # model -> version that this process has handed to Serve
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def deploy(self, name: str, version: int | None = None) -> Deployment:
        """Wants `name` served in this version, or in its newest one; replaces another version in place.

        Until the new version answers, the old one does. Asking again for what is there changes nothing.

        Raises:
            NotFound: the registry has no such model or version.
        """
        version = self._registry.get(name, version).version
        with self._lock:
            row = self._store.get_deployment(name)
            if row is not None and row.version == version and row.state != "FAILED":
                return self._refresh(row)
            self._asked.pop(name, None)
            return self._refresh(self._store.put_deployment(name, version, "DEPLOYING", None))

    def undeploy(self, name: str) -> None:
        """Ends the serving of a model; returns before its replica has answered its last requests.

        Raises:
            NotFound: the model is not deployed.
        """
        with self._lock:
            self._row(name)
            self._store.delete_deployment(name)
            self._asked.pop(name, None)
            self._handles.pop(name, None)
            self._serve.delete(PREFIX + name, _blocking=False)

    def get(self, name: str) -> Deployment:
        """The row with the state of this moment.

        Raises:
            NotFound: the model is not deployed.
        """
        with self._lock:
            return self._refresh(self._row(name))

    def wait(self, name: str, timeout_s: float) -> Deployment:
        """`get`, once it is no longer DEPLOYING or the time is over."""
        deadline = time.monotonic() + timeout_s
        while (row := self.get(name)).state == "DEPLOYING" and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return row
