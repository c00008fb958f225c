"""The OpenAPI document: what FastAPI derives from the routes, and what is true of all of them.

Routes declare what they take and answer, and refusals of their own by `refuses`. Here every operation gets those that
any may answer, each written once, in `components`: so a new route needs no line for them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from service import errors
from service.access import RULES
from service.declarations import header
from service.errors import ServiceError
from service.problems import PROBLEM, Problem

DESCRIPTION = """A distributed pretraining service on Ray.

Every refusal is `application/problem+json`: `code` is for programs, `reason` and `hint` are for people, and what is
`retryable` may be asked again after `Retry-After` seconds. `X-Request-ID` of an answer is in the service's log."""
TAGS = [
    {"name": "jobs", "description": "Submit, follow, pause, resume, cancel, retry, clone, compare."},
    {"name": "catalog", "description": "What a job may name, with the schema of its config."},
    {"name": "models", "description": "What jobs have registered; deploy it, and ask it."},
    {"name": "webhooks", "description": "Who is told when jobs change their states."},
    {"name": "access", "description": "Projects, tokens, and the log of changes."},
    {"name": "health", "description": "For probes, which take no token, and for Prometheus."},
]
BODY_ERRORS = (errors.TooSlow, errors.TooLarge, errors.UnsupportedMedia, errors.InvalidRequest)
HEADERS: dict[int, dict[str, str]] = {  # status -> header -> what it tells
    401: {"WWW-Authenticate": "How to ask (RFC 6750)."},
    429: {"Retry-After": "Seconds."},
    503: {"Retry-After": "Seconds."},
}


class Documented(FastAPI):
    """FastAPI with this document; an operation's id is the name of its function."""

    def __init__(self, **more: Any) -> None:
        super().__init__(
            title="Manta",
            description=DESCRIPTION,
            version="1",
            openapi_tags=TAGS,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,  # to an address that the Host of the request made up
            generate_unique_id_function=_name,
            **more,
        )

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        if "responses" not in document["components"]:
            _complete(document)
        return document


def _name(route: APIRoute) -> str:
    return route.name


def _complete(document: dict[str, Any]) -> None:
    """Adds what any operation may refuse to each of them."""
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    by_status = _by_status(ServiceError)
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of 422
        components["schemas"].pop(name, None)
    components["schemas"] |= problem.pop("$defs") | {"Problem": problem}
    problem["properties"]["code"]["enum"] = sorted(kind.__name__ for kinds in by_status.values() for kind in kinds)
    components["responses"] = {kinds[0].__name__: _response(kinds) for kinds in by_status.values()}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if RULES[f"{method.upper()} {path}"].least is None:
                operation.pop("security", None)
                continue
            wanted = {int(status) for status in operation["responses"] if int(status) >= 400} | _of_any(operation)
            for status in wanted:
                name = by_status[status][0].__name__
                operation["responses"][str(status)] = {"$ref": f"#/components/responses/{name}"}
            operation["responses"] = dict(sorted(operation["responses"].items()))


def _of_any(operation: dict[str, Any]) -> set[int]:
    """Statuses of what any operation of this form may refuse."""
    kinds: list[type[ServiceError]] = [errors.BadRequest, errors.Unauthorised, errors.Forbidden, errors.TooMany]
    kinds += [errors.InternalError, errors.Unavailable]
    parameters = operation.get("parameters", ())
    if any(parameter["in"] == "path" or parameter["name"] == "project" for parameter in parameters):
        kinds.append(errors.NotFound)
    if "requestBody" in operation:
        kinds += BODY_ERRORS
    return {kind.status for kind in kinds}


def _by_status(root: type[ServiceError]) -> dict[int, list[type[ServiceError]]]:
    """The tree by status; of each the class that is nearest to the root first."""
    found = defaultdict(list)
    level = root.__subclasses__()
    while level:
        for kind in level:
            found[kind.status].append(kind)
        level = [below for kind in level for below in kind.__subclasses__()]
    return {status: found[status] for status in sorted(found)}


def _response(kinds: list[type[ServiceError]]) -> dict[str, Any]:
    status = kinds[0].status
    answer: dict[str, Any] = {
        "description": "; ".join(f"{kind.__name__}: {kind.title}" for kind in kinds),
        "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if status in HEADERS:
        answer["headers"] = {name: header(text) | {"required": True} for name, text in HEADERS[status].items()}
    return answer
