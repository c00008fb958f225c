"""Projects: what jobs, models and tokens belong to. There is `default`; others are made by an admin of all."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.errors import Conflict, Forbidden
from service.principal import ALL, Principal
from service.store import Project, Store
from service.tokens import no_such_project


class Projects:
    """The table of projects."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, by: Principal, name: str) -> Project:
        """A new project.

        Raises:
            Forbidden: `by` is no admin of all projects.
            Conflict: there is one of this name.
        """
        if by.project != ALL or not by.is_at_least("admin"):
            raise Forbidden(f"got {by.role} {by.name} of {by.project}, expected an admin of all projects", "ask one")
        project = Project(name=name)
        try:
            with self._store.session() as session:
                session.add(project)
        except IntegrityError:
            raise Conflict(f"got project {name!r}, which is there already", "use it, or choose another name") from None
        return project

    def list(self, by: Principal) -> list[Project]:
        """Those that `by` sees."""
        query = sa.select(Project).order_by(Project.name)
        if by.project != ALL:
            query = query.filter_by(name=by.project)
        with self._store.session() as session:
            return list(session.scalars(query))

    def chosen(self, by: Principal, name: str | None) -> str:
        """The project that a request means: the one it names, or the principal's own.

        Raises:
            NotFound: there is no such project, for `by`.
        """
        name = name or by.home_project
        with self._store.session() as session:
            known = session.get(Project, name) is not None
        if not known or not by.sees(name):
            raise no_such_project(name)
        return name
