"""What a route tells the OpenAPI document beside its types; `service.contract` adds what is true of all routes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from pydantic import GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.errors import ServiceError

MOST_INT = 2**63 - 1  # that a database takes

Limit = Annotated[int, Query(ge=1, le=500, description="Most entries of a page.")]
Cursor = Annotated[int | None, Query(ge=1, le=MOST_INT, description="`next` of the page before.")]


class Shown:
    """The type that the document tells in place of the one that is validated here, as that costs or is done later.

    `Annotated[dict[str, Any], Shown(JobSpec)]`.
    """

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(TypeAdapter(self._kind).core_schema)


def refuses(*kinds: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route: what it refuses beside what any route may."""
    return {kind.status: {"description": kind.title} for kind in kinds}


def answers(status: int, kind: Any = None, description: str = "", **headers: str) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route: another status than its own, or headers, `Location="..."` and what each tells."""
    told: dict[str, Any] = {"description": description} if description else {}
    if kind is not None:
        told["model"] = kind
    if headers:
        told["headers"] = {name.replace("_", "-"): header(text) for name, text in headers.items()}
    return {status: told}


def header(text: str) -> dict[str, Any]:
    return {"description": text, "schema": {"type": "string"}}
