"""/v1/methods, /v1/searches and /v1/evaluations: what a job may name, with the schema of each."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.errors import NotFound
from workloads import catalog

router = APIRouter(prefix="/v1", tags=["catalog"])


def _entry(kind: str, name: str) -> dict[str, Any]:
    """Schema, defaults and paper of one name."""
    try:
        cls = catalog.load(kind, name)
    except catalog.UnknownName as error:
        raise NotFound(str(error), f"GET /v1/{catalog.PLURAL[kind]} lists them") from error
    schema = cls.Config.model_json_schema()
    defaults = {key: field["default"] for key, field in schema.get("properties", {}).items() if "default" in field}
    entry = {"name": name, "schema": schema, "defaults": defaults, "summary": (cls.__doc__ or "").strip()}
    if kind == "method":
        entry |= {"paper": cls.paper, "streams": list(cls.streams), "exports": cls.exports}
    if kind == "search":
        entry |= {"paper": cls.paper, "streams": list(cls.streams), "islands": cls.islands}
    return entry


@router.get("/methods")
def methods() -> dict[str, Any]:
    return {
        "methods": [{"name": name, "paper": catalog.load("method", name).paper} for name in sorted(catalog.METHODS)]
    }


@router.get("/methods/{name}")
def method(name: str) -> dict[str, Any]:
    """JSON Schema of the method's config, its defaults, its paper."""
    return _entry("method", name)


@router.get("/searches")
def searches() -> dict[str, Any]:
    return {
        "searches": [{"name": name, "paper": catalog.load("search", name).paper} for name in sorted(catalog.SEARCHES)]
    }


@router.get("/searches/{name}")
def search(name: str) -> dict[str, Any]:
    """JSON Schema of the search's config, its defaults, its paper."""
    return _entry("search", name)


@router.get("/evaluations")
def evaluations() -> dict[str, Any]:
    return {"evaluations": [{"name": name} for name in sorted(catalog.EVALUATIONS)]}


@router.get("/evaluations/{name}")
def evaluation(name: str) -> dict[str, Any]:
    return _entry("evaluation", name)
