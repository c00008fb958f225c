"""/v1/projects, /v1/tokens, /v1/audit: who may what, and who did what."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.access import CallerDep
from service.declarations import Cursor, Limit, answers, refuses
from service.errors import Conflict, NotFound
from service.parts import PartsDep
from service.people import (
    AuditPage,
    MadeToken,
    NewProject,
    NewToken,
    ProjectList,
    ProjectView,
    Quotas,
    TokenList,
    TokenView,
    entry_view,
    project_views,
    token_view,
)
from service.principal import ProjectName

router = APIRouter(prefix="/v1", tags=["access"])


@router.get("/projects")
def list_projects(parts: PartsDep, caller: CallerDep) -> ProjectList:
    """Those that the token sees."""
    return {"projects": project_views(parts.projects, parts.projects.list(caller))}


@router.post("/projects", status_code=201, responses=refuses(Conflict) | answers(201, Location="Of the project."))
def create_project(
    body: NewProject, parts: PartsDep, caller: CallerDep, request: Request, response: Response
) -> ProjectView:
    """Makes a project; an admin of all projects may."""
    row = parts.projects.create(caller, body.name, body.quotas)
    request.state.project = row.name  # for the audit log
    response.headers["Location"] = f"/v1/projects/{row.name}"
    return project_views(parts.projects, [row])[0]


@router.patch("/projects/{name}", responses=refuses(NotFound))
def change_project(
    name: ProjectName, body: Quotas, parts: PartsDep, caller: CallerDep, request: Request
) -> ProjectView:
    """Sets quotas of a project, those that the body names; null takes one away. What runs already goes on."""
    request.state.project = parts.projects.chosen(caller, name)  # for the audit log
    return project_views(parts.projects, [parts.projects.change(caller, name, body.quotas)])[0]


@router.get("/tokens")
def list_tokens(parts: PartsDep, caller: CallerDep) -> TokenList:
    """Those of the projects that the token sees, the newest first; revoked and expired ones too."""
    return {"tokens": [token_view(row) for row in parts.tokens.list(caller)]}


@router.post("/tokens", status_code=201, responses=refuses(NotFound, Conflict) | answers(201, Location="Of the token."))
def create_token(body: NewToken, parts: PartsDep, caller: CallerDep, request: Request, response: Response) -> MadeToken:
    """Makes a token. `token` is its text, which is told here and never again."""
    row, text = parts.tokens.create(caller, body.name, body.role, body.project, body.lifetime)
    request.state.project = body.project  # for the audit log
    response.headers["Location"] = f"/v1/tokens/{row.id}"
    return {**token_view(row), "token": text}


@router.delete("/tokens/{token_id}")
def revoke_token(token_id: str, parts: PartsDep, caller: CallerDep) -> TokenView:
    """Ends a token at once. Repeating it changes nothing."""
    return token_view(parts.tokens.revoke(caller, token_id))


@router.get("/audit")
def get_audit_log(parts: PartsDep, caller: CallerDep, limit: Limit = 50, cursor: Cursor = None) -> AuditPage:
    """Who asked for which change, the newest first; `next` is the cursor of the following page, null on the last."""
    page = parts.audit.list(caller, limit=limit, before=cursor)
    return {"entries": [entry_view(row) for row in page], "next": page[-1].id if len(page) == limit else None}
