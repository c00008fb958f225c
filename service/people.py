"""Projects, tokens and the audit log in requests and answers. Times are ISO 8601 in UTC."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.principal import DEFAULT_PROJECT, ProjectName, Role
from service.projects import Projects
from service.store import AuditEntry, Project, Token
from workloads.spec_training import Seconds

LIFETIME_S = 90 * 86400.0


class Quotas(BaseModel):
    """How much a project may have; null: no limit. What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    max_gpus: float | None = Field(default=None, ge=0, description="Of its running jobs together.")
    max_running: int | None = Field(default=None, ge=0, description="Jobs at a time; 0 holds its queue.")
    max_unfinished: int | None = Field(default=None, ge=0, description="Jobs in the queue, running and paused.")
    share: float = Field(default=1.0, gt=0, description="Of the cluster, beside those of other projects that wait.")

    @property
    def quotas(self) -> dict[str, Any]:
        """Those that were given."""
        return self.model_dump(include=self.model_fields_set & set(Quotas.model_fields))


class NewProject(Quotas):
    name: ProjectName


class NewToken(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[\w.@-]{1,80}$", description="Of the person or program it is for.")
    role: Role
    project: ProjectName | Literal["*"] = Field(default=DEFAULT_PROJECT, description="*: all, also those to come.")
    lifetime: Annotated[Seconds, Field(gt=0)] | None = Field(
        default=LIFETIME_S, description='Seconds, or "12h", "90d"; null: until it is revoked.'
    )


def project_views(projects: Projects, rows: Sequence[Project]) -> list[dict[str, Any]]:
    """Their quotas, and what of them is used."""
    used = projects.used([row.name for row in rows])
    names = list(Quotas.model_fields)
    return [
        {"name": row.name, "created_at": _iso(row.created_at)}
        | {name: getattr(row, name) for name in names}
        | {"used": used[row.name]}
        for row in rows
    ]


def token_view(row: Token) -> dict[str, Any]:
    """All that is known of it but the hash."""
    return {
        "id": row.id,
        "name": row.name,
        "role": row.role,
        "project": row.project,
        "created_by": row.created_by,
        "created_at": _iso(row.created_at),
        "expires_at": _iso(row.expires_at),
        "revoked_at": _iso(row.revoked_at),
        "last_used_at": _iso(row.last_used_at),
    }


def entry_view(row: AuditEntry) -> dict[str, Any]:
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


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
