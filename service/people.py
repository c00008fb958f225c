"""Projects, tokens and the audit log in requests and answers. Times are ISO 8601 in UTC."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from service.principal import DEFAULT_PROJECT, ProjectName, Role
from service.projects import Projects, Used
from service.store import AuditEntry, Project, Token
from workloads.spec_training import Seconds

MOST = 1_000_000  # jobs or GPUs of a project
LIFETIME_S = 90 * 86400.0
MOST_LIFETIME_S = 100 * 365 * 86400.0  # there is a last year that a calendar knows


class Quotas(BaseModel):
    """How much a project may have; null: no limit. What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    max_gpus: float | None = Field(default=None, ge=0, le=MOST, description="Of its running jobs together.")
    max_running: int | None = Field(default=None, ge=0, le=MOST, description="Jobs at a time; 0 holds its queue.")
    max_unfinished: int | None = Field(
        default=None, ge=0, le=MOST, description="Jobs in the queue, running and paused."
    )
    share: float = Field(
        default=1.0, ge=0.001, le=1000, description="Of the cluster, beside those of other projects that wait."
    )

    @property
    def quotas(self) -> dict[str, Any]:
        """Those that were given."""
        return self.model_dump(include=self.model_fields_set & set(Quotas.model_fields))


class NewProject(Quotas):
    name: ProjectName


class NewToken(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[\w.@-]{1,80}$", description="Of the person or program it is for.")
    role: Role
    project: ProjectName | Literal["*"] = Field(default=DEFAULT_PROJECT, description="*: all, also those to come.")
    lifetime: Annotated[Seconds, Field(gt=0, le=MOST_LIFETIME_S)] | None = Field(
        default=LIFETIME_S, description='Seconds, or "12h", "90d"; null: until it is revoked.'
    )


class ProjectView(TypedDict):
    """A project, and what it may have; null: no limit."""

    name: str
    created_at: str
    max_gpus: float | None
    max_running: int | None
    max_unfinished: int | None
    share: float
    used: Used


class ProjectList(TypedDict):
    """By name."""

    projects: list[ProjectView]


class TokenView(TypedDict):
    """A token without its text."""

    id: str
    name: Annotated[str, Field(description="Of the person or program it is for.")]
    role: Role
    project: Annotated[str, Field(description="*: all.")]
    created_by: str
    created_at: str
    expires_at: Annotated[str | None, Field(description="null: it does not.")]
    revoked_at: str | None
    last_used_at: Annotated[str | None, Field(description="To the minute.")]


class MadeToken(TokenView):
    token: Annotated[str, Field(description="Its text, told here and never again.")]


class TokenList(TypedDict):
    """The newest first."""

    tokens: list[TokenView]


class AuditEntryView(TypedDict):
    """One change that somebody asked for."""

    id: int
    time: str
    who: str
    token_id: Annotated[str | None, Field(description="null: by the machine of the service itself.")]
    project: str
    action: Annotated[str, Field(description="Method and route.")]
    target: Annotated[str, Field(description="The id or name in the path, or of what was made.")]
    request_id: str
    status: Annotated[int | None, Field(description="Of the answer; null: the service died before it gave one.")]


class AuditPage(TypedDict):
    """The newest first."""

    entries: list[AuditEntryView]
    next: Annotated[int | None, Field(description="`cursor` of the following page; null: this is the last.")]


def project_views(projects: Projects, rows: Sequence[Project]) -> list[ProjectView]:
    """Their quotas, and what of them is used."""
    used = projects.used([row.name for row in rows])
    return [
        {
            "name": row.name,
            "created_at": _iso(row.created_at),
            "max_gpus": row.max_gpus,
            "max_running": row.max_running,
            "max_unfinished": row.max_unfinished,
            "share": row.share,
            "used": used[row.name],
        }
        for row in rows
    ]


def token_view(row: Token) -> TokenView:
    """All that is known of it but the hash."""
    return {
        "id": row.id,
        "name": row.name,
        "role": row.role,
        "project": row.project,
        "created_by": row.created_by,
        "created_at": _iso(row.created_at),
        "expires_at": _iso_or_none(row.expires_at),
        "revoked_at": _iso_or_none(row.revoked_at),
        "last_used_at": _iso_or_none(row.last_used_at),
    }


def entry_view(row: AuditEntry) -> AuditEntryView:
    return {
        "id": row.id,
        "time": _iso(row.time),
        "who": row.who,
        "token_id": row.token_id,
        "project": row.project,
        "action": row.action,
        "target": row.target,
        "request_id": row.request_id,
        "status": row.status,
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _iso_or_none(seconds: float | None) -> str | None:
    return None if seconds is None else _iso(seconds)
