"""Who asks, and what they may: a name, one project or all of them, and a role there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

Role = Literal["viewer", "submitter", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)  # each may what the ones before it may
ALL = "*"  # in place of a project: every one, also those to come
DEFAULT_PROJECT = "default"

ProjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]  # as Kubernetes names namespaces


@dataclass(frozen=True)
class Principal:
    """One who asks.

    Attributes:
        name: of a person or a program; its tokens share it, so a new token goes on with the jobs of the old one.
        project: the one it may see, or `*`.
        role: there.
        token_id: None: of this machine, by no token.
    """

    name: str
    project: str = ALL
    role: Role = "admin"
    token_id: str | None = None

    def sees(self, project: str) -> bool:
        return self.project in (ALL, project)

    def is_at_least(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)

    @property
    def home_project(self) -> str:
        """Where its jobs go unless it says otherwise."""
        return DEFAULT_PROJECT if self.project == ALL else self.project


LOCAL = Principal("local")  # whoever reaches a service that has no tokens and listens on loopback only
