"""A receiver of webhooks that does what it is told, and the services that deliver to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from service.deliverer import Deliverer
from service.principal import LOCAL
from service.settings import Settings
from service.store import Delivery, Job, JobEvent, JobState, Store, Webhook
from service.webhooks import Webhooks

STATES: tuple[JobState, ...] = ("QUEUED", "STARTING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED")
URL = "https://hooks.example/manta?key=1"


async def public(host: str, port: int) -> list[str]:
    return ["93.184.216.34"]


class Stage:
    """A database, a receiver that does what it is told, and services that may die."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, reconcile_interval_s=3600)
        self.store = Store(self.settings.database)
        self.empty()

    def empty(self) -> None:
        with self.store.session() as session:
            for table in (Delivery, Webhook, JobEvent, Job):
                session.execute(sa.delete(table))
        self.now = 1_000_000.0
        self.answers: list[str] = []  # what the receiver does next; afterwards it is well
        self.got: list[httpx.Request] = []  # what it accepted
        self.jobs = 0
        self.hooks = Webhooks(self.settings, self.store, lambda: self.now, public)
        self.services = [self.service() for _ in range(2)]

    def service(self) -> Deliverer:
        transport = httpx.MockTransport(self.receive)
        return Deliverer(self.settings, self.store, lambda: self.now, transport=transport, find=public)

    def receive(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers.pop(0) if self.answers else "200"
        if answer == "down":
            raise httpx.ConnectError("refused")
        if answer == "slow":
            raise httpx.ReadTimeout("nothing came")
        if answer in ("200", "lost"):
            self.got.append(request)
        if answer == "lost":
            raise httpx.RemoteProtocolError("it broke off")
        return httpx.Response(int(answer), headers={"Location": "https://elsewhere.example"})

    def hook(self, states: tuple[JobState, ...] = STATES) -> Webhook:
        return self.hooks.create(LOCAL, "default", URL, [*states])

    def job(self, project: str = "default") -> int:
        self.jobs += 1
        with self.store.session() as session:
            job = Job(id=f"job-{self.jobs}", name="n", spec={}, origin="rest", project=project)
            job.become("QUEUED", "accepted")
            session.add(job)
        return job.number

    def become(self, number: int, state: JobState) -> None:
        with self.store.session() as session:
            row = session.get(Job, number)
            assert row is not None
            row.become(state, f"it is {state}")

    def turn(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.services[0].round()

    def crash(self, sent: bool) -> None:
        """A service claims, perhaps sends, and dies before it writes what came of it."""
        dying = self.services[1]
        dying._fan_out()
        claims = dying._claim()
        if sent and claims:
            dying._sender.send([claim.message for claim in claims])

    def settle(self) -> None:
        """The receiver is well, and time goes by."""
        self.answers = []
        for _ in range(200):
            self.now += 3700
            self.services[0].round()
            with self.store.session() as session:
                waiting = session.scalar(sa.select(sa.func.count()).where(Delivery.state == "PENDING"))
            if not waiting:
                return
        raise AssertionError("not all was delivered")

    def accepted(self) -> list[tuple[str, dict[str, Any]]]:
        return [(request.headers["webhook-id"], json.loads(request.content)) for request in self.got]

    def row(self, hook: Webhook) -> Webhook:
        return self.hooks.get(hook.id)
