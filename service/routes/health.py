"""/healthz: the process lives. /readyz: it can take requests, or what is missing."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Response
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError
from typing_extensions import TypedDict

from service.declarations import answers
from service.parts import PartsDep

logger = logging.getLogger(__name__)

SILENT_S = 60.0  # of the reconciler: Ray is waited for half of that, the database less

router = APIRouter(tags=["health"])


class Alive(TypedDict):
    status: Literal["ok"]


class Readiness(TypedDict):
    status: Literal["ready", "missing"]
    missing: Annotated[dict[str, str], Field(description="database, reconciler, ray, catalog: what is the matter.")]


@router.get("/healthz")
async def check_health() -> Alive:
    """The process lives."""
    return {"status": "ok"}


@router.get("/readyz", responses=answers(503, Readiness, "Something is missing."))
def check_readiness(parts: PartsDep, response: Response) -> Readiness:
    """It can take requests, or what is missing."""
    missing = {}
    try:
        with parts.store.session() as session:
            session.execute(sa.text("SELECT 1"))
    except SQLAlchemyError as error:
        missing["database"] = str(error.__cause__ or error)
    if not parts.reconciler.alive:
        missing["reconciler"] = "its thread has ended; restart the service"
    elif (silent_s := parts.reconciler.silent_s) > SILENT_S:
        missing["reconciler"] = f"hangs for {silent_s:.0f} s; see what it asks, Ray and the database, or restart it"
    if parts.reconciler.ray_error is not None:
        missing["ray"] = parts.reconciler.ray_error
    if not parts.warm.is_set():
        missing["catalog"] = "is being imported"
    if missing and not parts.settings.local:  # anybody may ask, and errors tell of addresses
        logger.warning("not ready: %s", missing)
        missing = dict.fromkeys(missing, "the log of the service says more")
    response.status_code = 503 if missing else 200
    return {"status": "missing" if missing else "ready", "missing": missing}
