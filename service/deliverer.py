"""Tells webhooks what happened to jobs: at least once, in the order of each job, whoever dies meanwhile.

The table of events is the outbox: an event is written in the transaction that changes its job, and stays marked until
its deliveries are written. No cursor is kept, which could pass by an event whose transaction commits late. A delivery
is claimed by counting its attempts up, so of several front ends one sends it; one that dies in between loses the claim
after `LEASE_S`, and the same message, with the same id, is sent again.

A delivery that is not accepted is tried again after 5, 10, 20 s, ... up to an hour, give or take half of it, for three
days. Later events of the same job wait for it, those of other jobs do not. A webhook that has accepted nothing since
then, or answers 410, is disabled and says why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased
from standardwebhooks import Webhook as Signer

from service.settings import Settings
from service.store import Delivery, DeliveryState, Job, JobEvent, Store, Webhook
from service.webhook_sender import DEADLINE_S, Message, Outcome, Sender
from service.webhook_targets import Resolve, resolve
from service.webhook_views import event_type, iso
from service.webhooks import new_id

logger = logging.getLogger(__name__)

LEASE_S = 60.0  # of a claim; well above the deadline
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 3600.0
GIVE_UP_S = 3 * 86400.0
KEEP_S = 30 * 86400.0  # deliveries that are done
TIDY_S = 3600.0  # between two looks for older ones
EVENTS_AT_ONCE = 500
AT_ONCE, AT_ONCE_OF_ONE = 32, 4  # requests, and those of one webhook: one that is slow does not hold up the others
GONE = 410


@dataclass(frozen=True)
class Claim:
    """A delivery that this process is to send now."""

    number: int
    attempt: int
    webhook_id: str
    message: Message


def pause(attempt: int, rng: random.Random) -> float:
    """Seconds from the start of a failed attempt (1, 2, ...) to the next."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt - 1, 20)) * rng.uniform(0.5, 1.5)


class Deliverer:
    """One thread that writes deliveries and sends those that are due."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        clock: Callable[[], float] = time.time,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        find: Resolve = resolve,
    ) -> None:
        """Keeps its parts.

        Args:
            settings: of the service.
            store: the database.
            clock: seconds since the epoch.
            transport: for tests, `httpx.MockTransport`.
            find: resolves names.
        """
        self._settings, self._store, self._clock = settings, store, clock
        self._sender = Sender(settings.webhook_hosts, transport, find)
        self._rng = random.Random()
        self._tidy_at = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deliverer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leaves requests that are under way; they are sent again by whoever comes next."""
        self._done.set()
        self._sender.stop()
        if self._thread.is_alive():
            self._thread.join(timeout=DEADLINE_S)  # not for ever: a look at a name cannot be broken off

    def _run(self) -> None:
        while not self._done.is_set():
            sent = 0
            try:
                sent = self.round()
            except asyncio.CancelledError:
                return
            except Exception:
                logger.exception("a round of the deliverer failed; the next one tries again")
            if not sent:
                self._done.wait(self._settings.reconcile_interval_s)

    def round(self) -> int:
        """Writes deliveries of new events and sends what is due; returns how many it tried to."""
        self._fan_out()
        claims = self._claim()
        if claims:
            for claim, outcome in zip(claims, self._sender.send([one.message for one in claims]), strict=True):
                self._settle(claim, outcome)
        self._tidy()
        return len(claims)

    def _fan_out(self) -> None:
        """A delivery for each webhook that wants to know, of each event that has none yet, in one transaction."""
        fresh = ~JobEvent.fanned_out
        with self._store.session() as session:
            some = sa.select(JobEvent.id).where(fresh).order_by(JobEvent.id).limit(EVENTS_AT_ONCE)
            found = session.scalars(some.with_for_update(skip_locked=True)).all()  # SQLite has no such lock,
            if not found:
                return
            take = sa.update(JobEvent).where(JobEvent.id.in_(found), fresh).values(fanned_out=True)  # hence `fresh`
            ours = session.execute(take.returning(JobEvent.id, JobEvent.job_number, JobEvent.kind)).all()
            hooks = session.scalars(sa.select(Webhook).where(Webhook.disabled_at.is_(None))).all()
            if not hooks:
                return
            numbers = {event.job_number for event in ours}
            projects = sa.select(Job.number, Job.project).where(Job.number.in_(numbers))
            project_of = {number: project for number, project in session.execute(projects)}
            now = self._clock()
            for event in sorted(ours):
                session.add_all(
                    Delivery(
                        id=new_id(),
                        webhook_id=hook.id,
                        event_id=event.id,
                        job_number=event.job_number,
                        created_at=now,
                        next_try_at=now,
                    )
                    for hook in hooks
                    if hook.project == project_of[event.job_number] and event.kind.upper() in hook.states
                )

    def _claim(self) -> list[Claim]:
        """Deliveries that are due, and that this process has to itself until the lease ends."""
        now = self._clock()
        claims = []
        with self._store.session() as session:
            for delivery, hook, event, job in session.execute(_due(now)).all():
                attempt = delivery.attempts + 1
                ours = sa.update(Delivery).where(
                    Delivery.number == delivery.number, Delivery.attempts < attempt, Delivery.state == "PENDING"
                )
                taken: Any = session.execute(ours.values(attempts=attempt, next_try_at=now + LEASE_S))
                if taken.rowcount:
                    claims.append(_message(delivery, hook, event, job, now, attempt))
        return claims

    def _settle(self, claim: Claim, outcome: Outcome) -> None:
        """Writes what came of a delivery, unless its lease had ended and another one has it."""
        now = self._clock()
        with self._store.session() as session:
            hook = session.get(Webhook, claim.webhook_id, with_for_update=True)  # first: `_disable` locks others
            row = session.get(Delivery, claim.number, with_for_update=True)
            if row is None or hook is None or row.state != "PENDING" or row.attempts != claim.attempt:
                return
            row.status, row.error = outcome.status, outcome.error
            if outcome.error is None:
                row.state, row.finished_at = "DELIVERED", now
                hook.accepted_at, hook.disabled_at, hook.reason = now, None, None
                return
            logger.info("webhook %s, attempt %d of %s: %s", hook.id, row.attempts, row.id, outcome.error)
            tired = now - row.created_at >= GIVE_UP_S
            if tired or row.event_id is None or outcome.status == GONE:
                row.state, row.finished_at = "FAILED", now
            else:
                row.next_try_at = now + pause(row.attempts, self._rng)
            if outcome.status == GONE or (tired and (hook.accepted_at or 0.0) < row.created_at):
                _disable(session, hook, f"accepted nothing since {iso(row.created_at)}; at last: {outcome.error}", now)

    def _tidy(self) -> None:
        now = self._clock()
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_S
            with self._store.session() as session:
                session.execute(sa.delete(Delivery).where(Delivery.finished_at < now - KEEP_S))


def _due(now: float) -> sa.Select[Delivery, Webhook, JobEvent, Job]:
    """What may be sent: nothing before an earlier event of its job, a few of each webhook."""
    pending: DeliveryState = "PENDING"
    earlier = aliased(Delivery)
    waits = sa.exists().where(
        earlier.webhook_id == Delivery.webhook_id,
        earlier.job_number == Delivery.job_number,
        earlier.event_id < Delivery.event_id,
        earlier.state == pending,
    )
    still_comes = sa.exists().where(  # another front end is about to write it
        JobEvent.job_number == Delivery.job_number, JobEvent.id < Delivery.event_id, ~JobEvent.fanned_out
    )
    place = sa.func.row_number().over(
        partition_by=Delivery.webhook_id, order_by=(Delivery.next_try_at, Delivery.number)
    )
    some = (
        sa.select(Delivery.number, place.label("place"))
        .join(Webhook, Webhook.id == Delivery.webhook_id)
        .where(Delivery.state == pending, Delivery.next_try_at <= now, ~waits, ~still_comes)
        .where(sa.or_(Webhook.disabled_at.is_(None), Delivery.event_id.is_(None)))  # a ping may go to any
        .subquery()
    )
    return (
        sa.select(Delivery, Webhook, JobEvent, Job)
        .join(some, some.c.number == Delivery.number)
        .join(Webhook, Webhook.id == Delivery.webhook_id)
        .outerjoin(JobEvent, JobEvent.id == Delivery.event_id)
        .outerjoin(Job, Job.number == Delivery.job_number)
        .where(some.c.place <= AT_ONCE_OF_ONE)
        .order_by(some.c.place, Delivery.next_try_at, Delivery.number)
        .limit(AT_ONCE)
    )


def _message(
    delivery: Delivery, hook: Webhook, event: JobEvent | None, job: Job | None, now: float, attempt: int
) -> Claim:
    """The request: only what never changes is in its body, so each attempt sends the same bytes."""
    data = {}
    if event is not None and job is not None:
        data = {"id": job.id, "name": job.name, "project": job.project, "owner": job.owner}
        data |= {"state": event.kind.upper(), "message": event.message}
    happened = iso(delivery.created_at if event is None else event.time)
    document = {"type": event_type(event.kind if event else None), "timestamp": happened, "data": data}
    text = json.dumps(document)
    signature = Signer(hook.secret).sign(delivery.id, datetime.fromtimestamp(int(now), UTC), text)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "manta",
        "webhook-id": delivery.id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": signature,
    }
    return Claim(delivery.number, attempt, hook.id, Message(hook.url, headers, text.encode()))


def _disable(session: Session, hook: Webhook, reason: str, now: float) -> None:
    """It is sent nothing more but pings; what waited has failed."""
    hook.disabled_at, hook.reason = now, reason
    rest = sa.update(Delivery).where(Delivery.webhook_id == hook.id, Delivery.state == "PENDING")
    session.execute(rest.values(state="FAILED", error="the webhook was disabled", finished_at=now))
    logger.warning("webhook %s is disabled: it %s", hook.id, reason)
