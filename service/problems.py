"""Errors as answers: `application/problem+json`, RFC 9457."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.responses import JSONResponse

from service.errors import ServiceError

PROBLEM = "application/problem+json"


def answer(error: ServiceError, headers: Mapping[str, str] = MappingProxyType({})) -> JSONResponse:
    """What the service refused; with further headers."""
    return JSONResponse(error.problem(), error.status, {**error.headers, **headers}, PROBLEM)


def plain(
    status: int, title: str, detail: str, hint: str = "", headers: dict[str, str] | None = None, **more: Any
) -> JSONResponse:
    """What the framework refused."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "hint": hint}
    return JSONResponse(body | {"retryable": False} | more, status, headers, PROBLEM)
