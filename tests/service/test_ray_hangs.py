"""A head that takes connections and says nothing is away, not waited for; and a reconciler that hangs is seen."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray.job_submission import JobSubmissionClient

from service import ray_jobs
from service.errors import Unavailable
from service.ray_jobs import RayJobs
from service.reconciler import Reconciler
from service.routes.health import SILENT_S
from service.settings import Settings
from tests.service.rest import Service
from tests.service.world import BODY, World


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head that hangs."""
    monkeypatch.setattr(ray_jobs, "TIMEOUT_S", (5.0, 0.02))
    monkeypatch.setattr("ray.dashboard.modules.dashboard_sdk.get_auth_headers_if_auth_enabled", lambda _: {})
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("connected", [False, True])
def test_a_head_that_is_silent_does_not_answer(
    silent: str, connected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first question on, or after it answered once."""
    if connected:
        monkeypatch.setattr(JobSubmissionClient, "_check_connection_and_version", lambda *_, **__: None)
    ray = RayJobs(Settings(home=tmp_path, ray_dashboard_url=silent))
    for _ in range(2):
        with pytest.raises(
            Unavailable, match="list jobs: .*timed out" if connected else "does not answer: .*timed out"
        ):
            ray.statuses()


def test_a_reconciler_that_hangs_is_not_ready(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.parts.reconciler.silent_s < SILENT_S
    monkeypatch.setattr(Reconciler, "silent_s", SILENT_S + 1)
    answer = client.get("/readyz")
    assert answer.status_code == 503 and "hangs for 61 s" in answer.json()["missing"]["reconciler"]


def test_a_round_of_many_jobs_gives_signs_of_life_and_ends_when_it_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reconciler, signs = world.reconciler, []
    for _ in range(3):
        world.submissions.submit(BODY)
    clock = iter(range(100))
    monkeypatch.setattr("service.reconciler.time.monotonic", lambda: float(next(clock)))

    def settle(*_: Any) -> None:
        signs.append(reconciler._sign)
        if len(signs) == 2:
            reconciler._done.set()

    monkeypatch.setattr(reconciler, "_settle", settle)
    reconciler.round()
    assert len(signs) == 2 and None not in signs and signs[0] != signs[1]
