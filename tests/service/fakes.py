"""A Ray that can forget, lie and be away, and runs that live in its head."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.errors import Unavailable
from service.packing import Hardware, Node
from service.ray_jobs import RayStatus, submission_id
from workloads.record import Record, RunFolder, RunState

T = TypeVar("T")


class FakeRay:
    """Stands in for RayJobs: keeps statuses and counts submissions of each job."""

    def __init__(self, cpus: float = 4, gpus: float = 0) -> None:
        self.known: dict[str, RayStatus] = {}
        self.submitted: list[tuple[str, int]] = []
        self.stopped: list[str] = []
        self.cpus, self.gpus = cpus, gpus
        self.drivers: int | None = None
        self.used: dict[str, float] = {}  # on its node
        self.away = False
        self.refuse_submit = False

    def _reach(self) -> None:
        if self.away:
            raise Unavailable("Ray does not answer")

    def statuses(self) -> dict[str, RayStatus]:
        self._reach()
        return dict(self.known)

    def submit(self, job_id: str, attempt: int) -> None:
        self._reach()
        if self.refuse_submit:
            raise Unavailable("Ray could not submit job")
        name = submission_id(job_id, attempt)
        if name in self.known:
            return
        self.known[name] = "RUNNING"
        self.submitted.append((job_id, attempt))

    def stop(self, job_id: str, attempt: int) -> None:
        self._reach()
        self.stopped.append(job_id)

    def log_tail(self, job_id: str, attempt: int) -> str:
        return f"last words of {job_id}"

    def nodes(self) -> list[dict[str, float]]:
        self._reach()
        return [{"CPU": self.cpus, "GPU": self.gpus}]

    def hardware(self) -> Hardware:
        return Hardware([Node(total, self.used) for total in self.nodes()], self.drivers)


class Inline(Executor):
    """Runs what it is given at once."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def write_record(folder: Path, state: RunState, attempt: int = 1, *, age_s: float = 0.0, **more: Any) -> None:
    """What a run on another host would have written `age_s` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time() - age_s
    record = Record(
        job_id=folder.name, state=state, attempt=attempt, started_at=now, updated_at=now, host="node-9", **more
    )
    RunFolder(folder).record.write_text(record.model_dump_json())


def local_client(app: FastAPI, **headers: str) -> TestClient:
    """A client on the machine of the service, as the one without tokens expects it."""
    return TestClient(
        app,
        base_url="http://127.0.0.1",
        client=("127.0.0.1", 50000),
        headers=headers,
        raise_server_exceptions=False,
    )
