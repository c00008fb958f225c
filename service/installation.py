"""Tokens and projects of the installation on this machine, by its database: for who owns its folder.

The first token cannot be asked for by a token, and an admin may lose the last one. Who can write the database needs
neither; it is done under the name of the user, and stands in the audit log.
"""

from __future__ import annotations

import getpass
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from service.audit import Audit
from service.client import Answer, ApiError
from service.errors import InvalidRequest, ServiceError
from service.people import NewProject, NewToken, Quotas, entry_view, project_views, token_view
from service.principal import ALL, Principal
from service.projects import Projects
from service.settings import Settings
from service.store import Store
from service.tokens import Tokens

T = TypeVar("T")


class Installation:
    """The methods of `service.client.Client` for these, with the same answers and errors; a context manager."""

    def __init__(self, settings: Settings) -> None:
        self._store = Store(settings.database)
        self._me = Principal(f"local:{getpass.getuser()}"[:80])
        self._tokens, self._projects, self._audit = Tokens(self._store), Projects(self._store), Audit(self._store)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def projects(self) -> list[Answer]:
        return [dict(view) for view in project_views(self._projects, self._projects.list(self._me))]

    def create_project(self, name: str, **quotas: Any) -> Answer:
        new = _valid(NewProject, {"name": name, **quotas})

        def create() -> Answer:
            return dict(project_views(self._projects, [self._projects.create(self._me, new.name, new.quotas)])[0])

        return self._noted("POST /v1/projects", new.name, ALL, create)

    def change_project(self, name: str, **quotas: Any) -> Answer:
        wanted = _valid(Quotas, quotas).quotas

        def change() -> Answer:
            return dict(project_views(self._projects, [self._projects.change(self._me, name, wanted)])[0])

        return self._noted("PATCH /v1/projects/{name}", name, name, change)

    def tokens(self) -> list[Answer]:
        return [dict(token_view(row)) for row in self._tokens.list(self._me)]

    def create_token(self, name: str, role: str, *, project: str, lifetime: float | str | None) -> Answer:
        new = _valid(NewToken, {"name": name, "role": role, "project": project, "lifetime": lifetime})

        def create() -> Answer:
            row, text = self._tokens.create(self._me, new.name, new.role, new.project, new.lifetime)
            return {**token_view(row), "token": text}

        return self._noted("POST /v1/tokens", new.name, new.project, create)

    def revoke_token(self, token_id: str) -> Answer:
        row = self._tokens.find(token_id)
        whose = ALL if row is None else row.project
        return self._noted(
            "DELETE /v1/tokens/{token_id}",
            token_id,
            whose,
            lambda: dict(token_view(self._tokens.revoke(self._me, token_id))),
        )

    def audit(self, *, limit: int = 50) -> list[Answer]:
        return [dict(entry_view(row)) for row in self._audit.list(self._me, limit=limit)]

    def _noted(self, action: str, target: str, project: str, change: Callable[[], Answer]) -> Answer:
        entry = self._audit.begin(self._me, action, target, project, secrets.token_hex(8))
        try:
            answer = change()
        except ServiceError as error:
            self._audit.finish(entry, error.status)
            raise _as_answered(error) from error
        self._audit.finish(entry, 200, (answer["id"],) if "id" in answer else ())
        return answer


def _valid(model: type[Any], values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [{"loc": list(e["loc"]), "message": e["msg"], "hint": ""} for e in error.errors(include_url=False)]
        raise _as_answered(InvalidRequest(problems)) from error


def _as_answered(error: ServiceError) -> ApiError:
    return ApiError(error.status, error.title, error.detail, error.hint, code=error.code)
