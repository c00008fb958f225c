"""Projects: what jobs, models and tokens belong to, and how much they may have.

There is `default`; others are made by an admin of all, who sets their quotas too. `service.queue` keeps to these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from service.errors import Conflict, Forbidden, TooMany
from service.principal import ALL, Principal
from service.store import ACTIVE, TERMINAL, Job, Project, Store
from service.tokens import no_such_project
from service.usage import Quota


class Used(TypedDict):
    """By the jobs of a project now; GPUs that they may grow to."""

    gpus: float
    running: int
    unfinished: int


class Projects:
    """The table of projects."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, by: Principal, name: str, quotas: Mapping[str, Any] | None = None) -> Project:
        """A new project, with quotas as of `change`.

        Raises:
            Forbidden: `by` is no admin of all projects.
            Conflict: there is one of this name.
        """
        _expect_admin(by)
        project = Project(name=name, **(quotas or {}))
        try:
            with self._store.session() as session:
                session.add(project)
        except IntegrityError:
            raise Conflict(f"got project {name!r}, which is there already", "use it, or choose another name") from None
        return project

    def change(self, by: Principal, name: str, quotas: Mapping[str, Any]) -> Project:
        """Sets quotas of a project; jobs that run beyond a smaller one go on.

        Args:
            by: an admin of all projects.
            name: of the project.
            quotas: `max_gpus`, `max_running`, `max_unfinished` and `share`, or some of them.

        Raises:
            Forbidden: `by` is no admin of all projects.
            NotFound: there is none of this name.
        """
        _expect_admin(by)
        with self._store.session() as session:
            project = session.get(Project, name)
            if project is None:
                raise no_such_project(name)
            for column, value in quotas.items():
                setattr(project, column, value)
        return project

    def quota(self, name: str) -> Quota:
        """Of a project; none where there is no such."""
        with self._store.session() as session:
            row = session.get(Project, name)
        return Quota() if row is None else quota_of(row)

    def used(self, names: Sequence[str]) -> dict[str, Used]:
        """What the jobs of each have now: `gpus`, `running` and `unfinished`."""
        counts = sa.select(Job.project, Job.state.in_(ACTIVE), sa.func.count(), sa.func.sum(Job.most_gpus))
        query = counts.where(Job.state.not_in(TERMINAL), Job.project.in_(names)).group_by(Job.project, sa.text("2"))
        found: dict[str, Used] = {name: {"gpus": 0.0, "running": 0, "unfinished": 0} for name in names}
        with self._store.session() as session:
            for name, active, jobs, gpus in session.execute(query):
                found[name]["unfinished"] += jobs
                if active:
                    found[name]["running"], found[name]["gpus"] = jobs, gpus
        return found

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


def quota_of(row: Project) -> Quota:
    return Quota(row.max_gpus, row.max_running, row.share)


def expect_room(session: Session, name: str, more: int = 0) -> None:
    """Refuses a transaction after which the project would have more unfinished jobs than it may.

    Args:
        session: the transaction.
        name: of the project.
        more: jobs that are not in the table yet.

    Raises:
        TooMany: so it is.
    """
    project = session.get(Project, name, with_for_update=True)  # one transaction at a time counts
    if project is None or project.max_unfinished is None:
        return
    unfinished = sa.select(sa.func.count()).where(Job.project == name, Job.state.not_in(TERMINAL))
    if (count := (session.scalar(unfinished) or 0) + more) > project.max_unfinished:
        detail = f"got {count} unfinished jobs of project {name}, expected at most {project.max_unfinished}"
        raise TooMany(detail, "wait until some have ended, cancel some, or ask an admin for a larger quota", 60)


def _expect_admin(by: Principal) -> None:
    if by.project != ALL or not by.is_at_least("admin"):
        raise Forbidden(f"got {by.role} {by.name} of {by.project}, expected an admin of all projects", "ask one")
