"""The audit log: who asked for which change, when, and what came of it.

An entry is written before the change is made, so none is made without; its result is added before the answer goes out,
also where nobody waits for it any more. An entry without a result is one that broke off, the service having died: what
it changed is seen at its target.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import sqlalchemy as sa

from service.principal import ALL, Principal
from service.store import AuditEntry, Store


class Audit:
    """The table of the log; nothing is ever removed from it."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock

    def begin(self, by: Principal, action: str, target: str, project: str, request_id: str) -> int:
        """Notes that a change is about to be made; returns the number of the entry."""
        entry = AuditEntry(
            time=self._clock(),
            who=by.name,
            token_id=by.token_id,
            project=project,
            action=action,
            target=target[:200],
            request_id=request_id,
        )
        with self._store.session() as session:
            session.add(entry)
        return entry.id

    def finish(self, number: int, status: int, made: tuple[str, ...] = (), project: str = "") -> None:
        """Adds the status of the answer; ids of what was `made`; the project, where the path did not tell it.

        Of a list each gets an entry, so that whoever looks for one of them finds it.
        """
        values: dict[str, int | str] = {"status": status} | ({"project": project} if project else {})
        if made:
            values["target"] = made[0][:200]
        with self._store.session() as session:
            session.execute(sa.update(AuditEntry).filter_by(id=number).values(values))
            if len(made) > 1:
                same = session.execute(sa.select(AuditEntry.__table__).filter_by(id=number)).mappings().one()
                session.add_all(AuditEntry(**{**same, "id": None, "target": each}) for each in made[1:])

    def list(self, by: Principal, *, limit: int, before: int | None = None) -> list[AuditEntry]:
        """The newest first, of the projects that `by` sees; `before` is the id of the last entry of the page before."""
        query = sa.select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
        if by.project != ALL:
            query = query.filter_by(project=by.project)
        if before is not None:
            query = query.where(AuditEntry.id < before)
        with self._store.session() as session:
            return list(session.scalars(query))
