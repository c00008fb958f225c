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
