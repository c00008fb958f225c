"""Webhooks: who is told when a job changes its state, and what came of telling. `service.deliverer` does the telling.

Messages follow the Standard Webhooks specification (standardwebhooks.com). The secret by which they are signed lies
in the database as it is, since a signature cannot be made from a hash: who reads the database can sign as this
service. It is in the answer that makes the webhook, and in no other.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Callable

import sqlalchemy as sa

from service.errors import Conflict, NotFound
from service.principal import ALL, Principal
from service.settings import Settings
from service.store import Delivery, Job, JobEvent, JobState, Store, Webhook
from service.webhook_targets import Resolve, addresses, expect_url, resolve
from service.webhook_views import DeliveryView, delivery_view

MOST = 20  # of a project


class Webhooks:
    """The tables of webhooks and of deliveries as users see them."""

    def __init__(
        self, settings: Settings, store: Store, clock: Callable[[], float] = time.time, find: Resolve = resolve
    ) -> None:
        """Keeps its parts.

        Args:
            settings: of the service.
            store: the database.
            clock: seconds since the epoch.
            find: resolves names.
        """
        self._allowed, self._store, self._clock, self._find = settings.webhook_hosts, store, clock, find

    def create(self, by: Principal, project: str, url: str, states: list[JobState]) -> Webhook:
        """A new webhook of the project, with the secret.

        Raises:
            BadRequest: the service does not send to this URL.
            Conflict: the project has as many as it may.
        """
        asyncio.run(addresses(expect_url(url), self._allowed, self._find))
        row = Webhook(
            id=f"hook-{secrets.token_hex(6)}",
            project=project,
            url=url,
            states=sorted(set(states)),
            secret="whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
            created_by=by.name,
            created_at=self._clock(),
        )
        with self._store.session() as session:
            there = session.scalar(sa.select(sa.func.count()).select_from(Webhook).filter_by(project=project)) or 0
            if there >= MOST:
                raise Conflict(f"got one more webhook for {project}, which has {there}", "delete one of them")
            session.add(row)
        return row

    def find(self, webhook_id: str) -> Webhook | None:
        with self._store.session() as session:
            return session.get(Webhook, webhook_id)

    def get(self, webhook_id: str) -> Webhook:
        row = self.find(webhook_id)
        if row is None:
            raise no_such_webhook(webhook_id)
        return row

    def delete(self, webhook_id: str) -> None:
        """Ends it; what it was not told yet it is not told any more."""
        with self._store.session() as session:
            if session.get(Webhook, webhook_id, with_for_update=True) is None:
                raise no_such_webhook(webhook_id)
            session.execute(sa.delete(Delivery).filter_by(webhook_id=webhook_id))
            session.execute(sa.delete(Webhook).filter_by(id=webhook_id))

    def test(self, webhook_id: str) -> DeliveryView:
        """Has a ping sent, once; where it is accepted, a webhook that was disabled is told of events again."""
        now = self._clock()
        ping = Delivery(id=new_id(), webhook_id=self.get(webhook_id).id, created_at=now, next_try_at=now)
        with self._store.session() as session:
            session.add(ping)
        return delivery_view(ping, None, None)

    def deliveries(self, webhook_id: str, *, limit: int, before: int | None = None) -> list[DeliveryView]:
        """The newest first; `before` is the number of the last one of the page before."""
        query = (
            sa.select(Delivery, JobEvent.kind, Job.id)
            .outerjoin(JobEvent, JobEvent.id == Delivery.event_id)
            .outerjoin(Job, Job.number == Delivery.job_number)
            .where(Delivery.webhook_id == self.get(webhook_id).id)
            .order_by(Delivery.number.desc())
            .limit(limit)
        )
        if before is not None:
            query = query.where(Delivery.number < before)
        with self._store.session() as session:
            return [delivery_view(*row) for row in session.execute(query)]

    def list(self, project: str) -> list[Webhook]:
        """Those of a project, or `*`, the newest first."""
        query = sa.select(Webhook).order_by(Webhook.created_at.desc(), Webhook.id)
        if project != ALL:
            query = query.filter_by(project=project)
        with self._store.session() as session:
            return list(session.scalars(query))


def new_id() -> str:
    """Of a message; random, so that a database that was put back from a backup does not use one twice."""
    return f"msg_{secrets.token_hex(12)}"


def no_such_webhook(webhook_id: str) -> NotFound:
    return NotFound(f"got webhook {webhook_id!r}, which does not exist", "GET /v1/webhooks lists them")
