"""A client that goes away in the middle: Ray Serve cancels its request. A change is noted all the same."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.store import AuditEntry
from tests.service.secured import BODY, Secured


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    yield service
    service.close()


class Held:
    """A call that waits, so that the client can go away meanwhile."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call, self.begun, self.go_on = call, threading.Event(), threading.Event()

    def __call__(self, *words: Any, **more: Any) -> Any:
        self.begun.set()
        assert self.go_on.wait(60)
        return self._call(*words, **more)


def hang_up(service: Secured, held: Held, path: str, body: Any = None) -> None:
    """Posts, and is cancelled while the route's thread is at work."""
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    content = b"" if body is None else json.dumps(body).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": headers,
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(_: Any) -> None:
        pass

    async def main() -> None:
        task = asyncio.create_task(service.app(scope, receive, send))
        assert await asyncio.to_thread(held.begun.wait, 60)
        task.cancel()
        asyncio.get_running_loop().call_soon(held.go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def log(service: Secured) -> list[tuple[str, str, int | None]]:
    with service.store.session() as session:
        return [(row.action, row.target, row.status) for row in session.query(AuditEntry).order_by(AuditEntry.id)]


def test_what_was_made_is_named(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    submissions = service.parts.submissions
    held = Held(submissions.submit_all)
    monkeypatch.setattr(submissions, "submit_all", held)
    hang_up(service, held, "/v1/jobs:batch", [BODY, BODY])
    made = [job.id for job in service.parts.jobs.list(limit=9)][::-1]
    assert len(made) == 2 and log(service) == [("POST /v1/jobs:batch", job_id, 201) for job_id in made]


def test_a_change_has_its_result(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.job()
    held = Held(service.parts.jobs.cancel)
    monkeypatch.setattr(service.parts.jobs, "cancel", held)
    hang_up(service, held, f"/v1/jobs/{job_id}:cancel")
    assert service.parts.jobs.get(job_id).state == "CANCELLED"
    assert log(service) == [("POST /v1/jobs/{job_id}:cancel", job_id, 202)]


def test_also_while_the_entry_is_written(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.job()
    held = Held(service.parts.audit.begin)
    monkeypatch.setattr(service.parts.audit, "begin", held)
    hang_up(service, held, f"/v1/jobs/{job_id}:pause")
    assert log(service) == [("POST /v1/jobs/{job_id}:pause", job_id, 202)]


def test_a_bug_is_logged_and_noted(
    service: Secured, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    held = Held(broken)
    monkeypatch.setattr(service.parts.jobs, "cancel", held)
    with caplog.at_level(logging.ERROR):
        hang_up(service, held, f"/v1/jobs/{service.job()}:cancel")
    assert log(service)[0][-1] == 500 and "whose client had gone, failed" in caplog.text and "a bug" in caplog.text


def test_what_changes_nothing_ends_with_its_client(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    service.model("digits")
    began, ended = threading.Event(), []

    async def handle(_: str) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    monkeypatch.setattr(service.parts.deployments, "handle", handle)
    held = Held(lambda: None)
    held.begun = began
    hang_up(service, held, "/v1/models/digits:predict", {"images": ["aGVsbG8="]})
    assert ended == ["cancelled"] and log(service) == []
