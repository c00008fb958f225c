"""/metrics: numbers for Prometheus, for a token of all projects."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.responses import PlainTextResponse

from service.parts import PartsDep

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(parts: PartsDep, accept: Annotated[str, Header()] = "") -> Response:
    """Jobs, queue, runs, reconciler and requests, in the text format of Prometheus or as OpenMetrics."""
    text, content_type = parts.exposition.answer(accept)
    return Response(text, media_type=content_type)
