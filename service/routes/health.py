"""/healthz: the process lives. /readyz: it can take requests, or what is missing."""

from __future__ import annotations

import logging
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError

from service.parts import PartsDep

logger = logging.getLogger(__name__)

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
def readyz(parts: PartsDep, response: Response) -> dict[str, Any]:
    missing = {}
    try:
        with parts.store.session() as session:
            session.execute(sa.text("SELECT 1"))
    except SQLAlchemyError as error:
        missing["database"] = str(error.__cause__ or error)
    if not parts.reconciler.alive:
        missing["reconciler"] = "its thread has ended; restart the service"
    if parts.reconciler.ray_error is not None:
        missing["ray"] = parts.reconciler.ray_error
    if not parts.warm.is_set():
        missing["catalog"] = "is being imported"
    if missing and not parts.settings.local:  # anybody may ask, and errors tell of addresses
        logger.warning("not ready: %s", missing)
        missing = dict.fromkeys(missing, "the log of the service says more")
    response.status_code = 503 if missing else 200
    return {"status": "missing" if missing else "ready", "missing": missing}
