"""/v1/methods, /v1/searches and /v1/evaluations: what a job may name, with the schema of each.

The few searches are listed with all that is known of them; of methods that would be 100 kB.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from service.errors import NotFound
from workloads import catalog

router = APIRouter(prefix="/v1", tags=["catalog"])


class CatalogName(TypedDict):
    name: str


class WithPaper(CatalogName):
    paper: Annotated[str, Field(description="Authors, year, arXiv id.")]


class MethodList(TypedDict):
    methods: list[WithPaper]


class EvaluationList(TypedDict):
    evaluations: list[CatalogName]


class Entry(CatalogName):
    """What a job may say beside the name."""

    schema: Annotated[dict[str, Any], Field(description="JSON Schema of the config.")]
    defaults: dict[str, Any]
    summary: str


class MethodEntry(Entry):
    paper: str
    streams: Annotated[list[str], Field(description="Names that `data` must have.")]
    exports: Annotated[str, Field(description="Kind of model that it leaves.")]


class SearchEntry(Entry):
    paper: str
    streams: Annotated[list[str], Field(description="Names that `data` must have.")]
    islands: Annotated[bool, Field(description="Whether several populations may evolve beside each other.")]


class SearchList(TypedDict):
    searches: list[SearchEntry]


def _entry(kind: str, name: str) -> Any:
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
def list_methods() -> MethodList:
    return {
        "methods": [{"name": name, "paper": catalog.load("method", name).paper} for name in sorted(catalog.METHODS)]
    }


@router.get("/methods/{name}")
def get_method(name: str) -> MethodEntry:
    """JSON Schema of the method's config, its defaults, its paper."""
    return _entry("method", name)


@router.get("/searches")
def list_searches() -> SearchList:
    """Each with its schema and paper."""
    return {"searches": [_entry("search", name) for name in sorted(catalog.SEARCHES)]}


@router.get("/searches/{name}")
def get_search(name: str) -> SearchEntry:
    """JSON Schema of the search's config, its defaults, its paper."""
    return _entry("search", name)


@router.get("/evaluations")
def list_evaluations() -> EvaluationList:
    return {"evaluations": [{"name": name} for name in sorted(catalog.EVALUATIONS)]}


@router.get("/evaluations/{name}")
def get_evaluation(name: str) -> Entry:
    """JSON Schema of the evaluation's config, and its defaults."""
    return _entry("evaluation", name)
