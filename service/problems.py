"""Errors as answers: `application/problem+json`, RFC 9457, with extension members by which programs tell them apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from service.errors import ServiceError

PROBLEM = "application/problem+json"


class Wrong(BaseModel):
    """One of the problems of a request."""

    model_config = ConfigDict(extra="forbid")

    loc: list[str | int] = Field(description="The path to it: `body`, `query`, ... first, but of a job its own keys.")
    message: str = Field(description="What was got and expected.")
    hint: str = Field(description="What to do; may be empty.")


class Problem(BaseModel):
    """What every refusal and failure answers, as application/problem+json (RFC 9457)."""

    model_config = ConfigDict(extra="forbid")

    type: str = Field(description="urn:manta:error:CODE")
    title: str = Field(description="The same for all of one code.")
    status: int = Field(description="Of the answer.")
    code: str = Field(description="By which programs tell errors apart; it does not change.")
    detail: str = Field(description="What was got and expected, for people.")
    reason: str = Field(description="The same as `detail`, by the name that jobs and deployments use.")
    hint: str = Field(description="What to do; may be empty.")
    retryable: bool = Field(description="The same request may succeed later, after Retry-After seconds.")
    errors: list[Wrong] | None = Field(default=None, description="Each problem, of InvalidRequest and InvalidSpec.")


def answer(error: ServiceError, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    """The error as an answer, with further headers."""
    # What is told may repeat what was sent: half of a surrogate pair has no UTF-8.
    body = json.dumps(error.problem(), ensure_ascii=False).encode(errors="replace")
    return Response(body, error.status, {**error.headers, **headers}, PROBLEM)
