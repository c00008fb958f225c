"""Who may do what: one table of all routes, and the one place that looks at it.

`service.gate` finds out who asks. Here is decided, for every route and before it runs, whether that one may, and that
a change is written into the audit log first. What another project has does not exist for those who do not see it: 404.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.security import HTTPBearer
from starlette.routing import BaseRoute, compile_path

from service.errors import Forbidden, NotFound, Unauthorised
from service.jobs import no_such_job
from service.parts import Parts, PartsDep
from service.principal import ALL, Principal, Role
from service.store import Job, ModelName, Token, Webhook
from service.tokens import no_such_token
from service.webhooks import no_such_webhook
from workloads.log_lines import note


@dataclass(frozen=True)
class Rule:
    """What a route asks for.

    Attributes:
        least: the role, in the project of what the path names, or of the token; None: anybody, without a token.
        changes: it is written into the audit log.
        whole: it tells of all projects, so the token must be of all.
        own: a submitter may do it to jobs of its own only.
    """

    least: Role | None
    changes: bool = False
    whole: bool = False
    own: bool = False


RULES: dict[str, Rule] = {
    "GET /healthz": Rule(None),
    "GET /readyz": Rule(None),
    "GET /metrics": Rule("viewer", whole=True),
    "GET /docs": Rule(None),
    "GET /openapi.json": Rule(None),
    "GET /v1/methods": Rule("viewer"),
    "GET /v1/methods/{name}": Rule("viewer"),
    "GET /v1/evaluations": Rule("viewer"),
    "GET /v1/evaluations/{name}": Rule("viewer"),
    "GET /v1/searches": Rule("viewer"),
    "GET /v1/searches/{name}": Rule("viewer"),
    "GET /v1/jobs": Rule("viewer"),
    "POST /v1/jobs": Rule("submitter", changes=True),
    "POST /v1/jobs:batch": Rule("submitter", changes=True),
    "GET /v1/jobs/{job_id}": Rule("viewer"),
    "POST /v1/jobs/{job_id}:cancel": Rule("submitter", changes=True, own=True),
    "POST /v1/jobs/{job_id}:pause": Rule("submitter", changes=True, own=True),
    "POST /v1/jobs/{job_id}:resume": Rule("submitter", changes=True, own=True),
    "POST /v1/jobs/{job_id}:retry": Rule("submitter", changes=True, own=True),
    "POST /v1/jobs/{job_id}:clone": Rule("submitter", changes=True),
    "GET /v1/jobs/{job_id}/diff/{other_id}": Rule("viewer"),
    "GET /v1/jobs/{job_id}/events": Rule("viewer"),
    "GET /v1/jobs/{job_id}/metrics": Rule("viewer"),
    "GET /v1/jobs/{job_id}/evaluations": Rule("viewer"),
    "GET /v1/jobs/{job_id}/report": Rule("viewer"),
    "GET /v1/jobs/{job_id}/logs": Rule("viewer"),
    "GET /v1/models": Rule("viewer"),
    "GET /v1/models/{name}": Rule("viewer"),
    "POST /v1/models/{name}/deploy": Rule("operator", changes=True),
    "DELETE /v1/models/{name}/deploy": Rule("operator", changes=True),
    "POST /v1/models/{name}:predict": Rule("viewer"),
    "POST /v1/models/{name}:embed": Rule("viewer"),
    "POST /v1/models/{name}:reconstruct": Rule("viewer"),
    "GET /v1/webhooks": Rule("operator"),
    "POST /v1/webhooks": Rule("operator", changes=True),
    "GET /v1/webhooks/{webhook_id}": Rule("operator"),
    "DELETE /v1/webhooks/{webhook_id}": Rule("operator", changes=True),
    "POST /v1/webhooks/{webhook_id}:test": Rule("operator", changes=True),
    "GET /v1/webhooks/{webhook_id}/deliveries": Rule("operator"),
    "GET /v1/projects": Rule("viewer"),
    "POST /v1/projects": Rule("admin", changes=True),
    "PATCH /v1/projects/{name}": Rule("admin", changes=True),
    "GET /v1/tokens": Rule("admin"),
    "POST /v1/tokens": Rule("admin", changes=True),
    "DELETE /v1/tokens/{token_id}": Rule("admin", changes=True),
    "GET /v1/audit": Rule("admin"),
}
PUBLIC = frozenset(key.split(" ")[1] for key, rule in RULES.items() if rule.least is None)
OWNED = ("/v1/jobs/", "/v1/models/", "/v1/webhooks/", "/v1/tokens/")  # what is behind these belongs to a project
PUBLIC_FOLDER = "/docs/static/"  # files of an installed package


def without_rule(routes: Sequence[BaseRoute]) -> list[str]:
    """Routes that the table does not know: an app is not built with one."""
    found = []
    for route in iter_route_contexts(routes):
        if isinstance(route.original_route, APIRoute):
            found += [key for method in route.methods or () if (key := f"{method} {route.path}") not in RULES]
        elif route.path not in PUBLIC and route.path != PUBLIC_FOLDER.rstrip("/"):
            found.append(str(route.path))  # a mount: `authorise` does not run for it
    return found


def allowed_methods(path: str) -> str:
    """For Allow: the methods of all routes that the path is one of; Starlette tells those of the first."""
    found = [(method, route) for method, route in map(str.split, RULES) if compile_path(route)[0].match(path)]
    closest = max((len(route) for _, route in found), default=0)  # `x:cancel` is no `{job_id}`
    return ", ".join(sorted(method for method, route in found if len(route) == closest)) or "GET, HEAD"  # of a file


Bearer = Annotated[object, Security(HTTPBearer(auto_error=False, description="Of `manta token create`."))]


async def authorise(request: Request, parts: PartsDep, _: Bearer = None) -> None:
    """Runs before every route.

    Raises:
        Unauthorised: nobody is known to ask.
        NotFound: the principal does not see what the path names, or there is none such.
        Forbidden: its role is less than the route asks for.
    """
    key = f"{request.method} {request.scope['route'].path}"
    rule = RULES[key]
    if rule.least is None:
        return
    principal: Principal | None = getattr(request.state, "principal", None)
    if principal is None:
        raise Unauthorised("got no token", "send `Authorization: Bearer TOKEN`")
    if rule.whole and principal.project != ALL:
        detail = f"got a token of {principal.project}, expected one of all projects for {key}"
        raise Forbidden(detail, "ask an admin of all projects for a viewer: manta token create NAME --all-projects")
    if job_id := request.path_params.get("job_id"):
        note(job_id=job_id)
    if rule.changes:
        request.state.changes = True
        await run_in_threadpool(_look, parts, principal, rule, key, request)
    elif request.path_params and principal.project != ALL:
        if "/v1/models/{name}" in key and parts.registry.remembers(request.path_params["name"]):
            _look(parts, principal, rule, key, request)  # a prediction does not wait for a thread
        else:
            await run_in_threadpool(_look, parts, principal, rule, key, request)
    elif not principal.is_at_least(rule.least):
        raise _too_little(principal, rule, request)


def _look(parts: Parts, principal: Principal, rule: Rule, key: str, request: Request) -> None:
    """`authorise`, where the database must be asked."""
    path, named = request.scope["route"].path, request.path_params
    thing = _named(parts, path, named)
    seen = thing is not None and principal.sees(thing.project)
    if rule.changes:
        project = thing.project if thing is not None and seen else principal.home_project
        target = ",".join(map(str, named.values()))
        request.state.audit = parts.audit.begin(principal, key, target, project, request.state.request_id)
    if not seen and principal.project != ALL and path.startswith(OWNED):
        raise _missing(parts, principal, path, named)
    if rule.least is None or not principal.is_at_least(rule.least):
        raise _too_little(principal, rule, request)
    if rule.own and principal.role == "submitter" and isinstance(thing, Job) and thing.owner != principal.name:
        detail = f"got submitter {principal.name}, expected {thing.owner}, whose job it is, or an operator"
        raise Forbidden(detail, "ask one of them")


def _named(parts: Parts, path: str, named: Mapping[str, str]) -> Job | ModelName | Webhook | Token | None:
    """What the path names, if it belongs to a project."""
    if path.startswith("/v1/jobs/"):
        return parts.jobs.find(named["job_id"])
    if path.startswith("/v1/models/"):
        return parts.registry.owner(named["name"])
    if path.startswith("/v1/webhooks/"):
        return parts.webhooks.find(named["webhook_id"])
    return parts.tokens.find(named["token_id"]) if path.startswith("/v1/tokens/") else None


def _missing(parts: Parts, principal: Principal, path: str, named: Mapping[str, str]) -> NotFound:
    """The same words whether another project has it or nobody."""
    if path.startswith("/v1/jobs/"):
        return no_such_job(named["job_id"])
    if path.startswith("/v1/models/"):
        return parts.registry.no_such_model(named["name"], principal.project)
    if path.startswith("/v1/webhooks/"):
        return no_such_webhook(named["webhook_id"])
    return no_such_token(named["token_id"])


def _too_little(principal: Principal, rule: Rule, request: Request) -> Forbidden:
    detail = f"got {principal.role} {principal.name}, expected {rule.least} for {request.method} {request.url.path}"
    return Forbidden(detail, "ask an admin of the project for a token of this role")


async def _caller(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


CallerDep = Annotated[Principal, Depends(_caller)]
