"""A service on a folder whose reconciler is turned by hand, under a Ray that says what a test wants."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from service.parts import build_parts
from service.ray_jobs import RayStatus, submission_id
from service.settings import Settings
from service.store import Job
from tests.service.fakes import FakeRay, Inline, write_record
from tests.service.rest import NoDeployments
from tests.toy import TOY_MAE, TOY_MODEL
from workloads.preflight import Check

BODY: dict[str, Any] = {
    "name": "toy",
    "method": TOY_MAE,
    "model": TOY_MODEL,
    "data": {"train": {"shards": "/x.tar"}},
    "epochs": 1,
}


class World:
    """A service on a folder, with a fake Ray; `restart` is a crash of the service."""

    def __init__(self, home: Path, *, checkers: Executor | None = None, **more: Any) -> None:
        self.settings = Settings(home=home, **more)
        self.checkers = checkers or Inline()
        self.check: Check = lambda *_: []
        self.ray = FakeRay()
        self.now = time.time()
        self.restart()

    def restart(self) -> None:
        parts = build_parts(
            self.settings,
            ray=self.ray,  # type: ignore[arg-type]
            deployments=NoDeployments(),  # type: ignore[arg-type]
            check=lambda *words: self.check(*words),
            clock=self.clock,
            wake=lambda: None,
            checkers=self.checkers,
        )
        self.store, self.reconciler = parts.store, parts.reconciler
        self.jobs, self.submissions = parts.jobs, parts.submissions

    def clock(self) -> float:
        return self.now

    def status(self, job: Job, status: RayStatus) -> None:
        """What Ray says of the newest attempt."""
        self.ray.known[submission_id(job.id, self.jobs.get(job.id).attempt)] = status

    def folder(self, job: Job) -> Path:
        return self.settings.runs / job.id

    def state(self, job: Job) -> str:
        return self.jobs.get(job.id).state

    def kinds(self, job: Job) -> list[str]:
        return [event["kind"] for event in self.jobs.events(job.id)]

    def stopped(self, job: Job, step: int = 0) -> None:
        """The run wrote its checkpoint and ended."""
        write_record(self.folder(job), "STOPPED", self.jobs.get(job.id).attempt, step=step)
        self.status(job, "STOPPED")
