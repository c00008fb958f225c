"""Requests by the second, bytes and seconds of a body, pixels; headers of every answer."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from service import limits
from service.errors import TooMany
from service.headers import SECURITY
from service.limits import BodyLimit, Rate
from tests.service.secured import BODY, Secured


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_the_rate() -> None:
    clock = Clock()
    rate = Rate(per_s=2, burst=3, clock=clock)
    for _ in range(3):
        rate.take("a")
    with pytest.raises(TooMany) as caught:
        rate.take("a")
    assert caught.value.headers == {"Retry-After": "1"} and caught.value.wait_s == 0.5
    rate.take("b")  # has its own
    clock.now += 0.5
    rate.take("a")
    with pytest.raises(TooMany):
        rate.take("a")
    clock.now += 1000
    for _ in range(3):
        rate.take("a")
    with pytest.raises(TooMany):
        rate.take("a")  # never more than a burst


def test_a_refusal_crosses_processes() -> None:
    again = pickle.loads(pickle.dumps(TooMany("a", "b", 3.5)))
    assert (again.detail, again.hint, again.wait_s) == ("a", "b", 3.5)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=200), st.integers(1, 10), st.floats(0.1, 20))
def test_never_more_than_burst_and_rate_allow(pauses: list[float], burst: int, per_s: float) -> None:
    clock = Clock()
    rate, taken, began = Rate(per_s, burst, clock), 0, clock.now
    for pause in pauses:
        clock.now += pause
        try:
            rate.take("a")
            taken += 1
        except TooMany as error:
            assert 0 < error.wait_s <= 1 / per_s + 1e-6
    assert 1 <= taken <= burst + (clock.now - began) * per_s + 1e-6


def test_buckets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BUCKETS", 10)
    rate = Rate(1, 1, Clock())
    for i in range(100):
        rate.take(str(i))
    assert len(rate._buckets) == 10
    with pytest.raises(TooMany):
        rate.take("99")


def ask(chunks: list[bytes | None], length: str | None = None, limit: int = 10) -> tuple[int, dict[str, Any]]:
    """Status and headers of an answer to a body that comes in chunks; None: the next one does not come."""
    app = FastAPI()

    @app.post("/")
    async def size(request: Request) -> int:
        return len(await request.body())

    sent: list[Message] = []
    waiting = iter(chunks)

    async def receive() -> Message:
        chunk = next(waiting, b"")
        if chunk is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b"", "scheme": "http"}
    asyncio.run(BodyLimit(app, limit, timeout_s=0.05)(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize(
    ("chunks", "length", "status"),
    [
        ([b"x" * 10], None, 200),
        ([b"x" * 4, b"x" * 6], None, 200),
        ([], None, 200),
        ([b"x" * 11], None, 413),
        ([b"x" * 4] * 1000, None, 413),
        ([b"x" * 4] * 1000, "4", 413),  # a length that is a lie
        ([], "11", 413),
        ([], "-1", 413),
        ([], "1e3", 413),
        ([None], None, 408),
        ([b"x", None], "10", 408),
    ],
)
def test_bodies(chunks: list[bytes | None], length: str | None, status: int) -> None:
    got, headers = ask(chunks, length)
    assert got == status
    assert headers[b"content-type"] == (b"application/json" if status == 200 else b"application/problem+json")
    assert headers.get(b"connection") == (None if status == 200 else b"close")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path, request_burst=3, requests_per_s=0.001, max_body_bytes=4096, cors_origins=())
    yield service
    service.close()


def test_the_rate_is_of_each_token_and_not_of_probes(service: Secured) -> None:
    client, other = (service.client(service.token(name, "admin")) for name in ("a", "b"))
    assert [client.get("/v1/jobs").status_code for _ in range(5)] == [200] * 3 + [429] * 2
    refused = client.get("/v1/jobs")
    assert refused.json()["retryable"] and int(refused.headers["retry-after"]) > 1
    assert other.get("/v1/jobs").status_code == 200
    assert {client.get("/healthz").status_code for _ in range(9)} == {200}


def test_wrong_tokens_of_an_address_are_bounded_and_good_ones_come_through(
    service: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = service.client(service.token("ann", "admin"))
    assert client.get("/v1/jobs").status_code == 200
    service.now += 60  # it is to be looked up again
    asked = []
    look = service.parts.tokens.authenticate
    monkeypatch.setattr(service.parts.tokens, "authenticate", lambda text: asked.append(text) or look(text))
    guesses = [service.client(f"manta_{n}").get("/v1/jobs") for n in range(9)]
    assert [answer.status_code for answer in guesses] == [401] * 3 + [429] * 6 and len(asked) == 3
    assert int(guesses[-1].headers["retry-after"]) > 1
    assert client.get("/v1/jobs").status_code == 200
    elsewhere = TestClient(service.app, client=("10.0.0.7", 1), headers={"Authorization": "Bearer manta_x"})
    assert elsewhere.get("/v1/jobs").status_code == 401


def test_an_upload_has_the_time_that_is_set(tmp_path: Path) -> None:
    service = Secured(tmp_path, upload_timeout_s=0.05)
    sent: list[Message] = []
    first = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Message:
        if (message := next(first, None)) is None:
            await asyncio.Event().wait()
        return message or {}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": headers, "query_string": b""}
    asyncio.run(
        asyncio.wait_for(service.app(scope | {"scheme": "http", "client": ("127.0.0.1", 1)}, receive, send), 20)
    )
    assert sent[0]["status"] == 408 and b"in 0.05 s" in sent[1]["body"]
    service.close()


def test_a_body_through_the_whole_app(service: Secured) -> None:
    client = service.client()
    long = iter([b'{"x": "', *[b"y" * 1000] * 9])
    answer = client.post("/v1/jobs", content=long, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["title"]) == (413, "Too large")
    service.token("root", "admin")
    unread = client.post("/v1/jobs", content=iter([b"y" * 1000] * 9), headers={"content-type": "application/json"})
    assert unread.status_code == 401  # who asks comes before what is asked


def test_headers_of_every_answer(service: Secured) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    client = service.client()
    answers = [client.get("/v1/jobs"), client.get("/nowhere"), client.post("/v1/jobs", json={})]
    answers.append(client.post("/v1/jobs", content=b"x" * 5000))
    service.parts.jobs.list = broken  # type: ignore[method-assign, assignment]
    answers.append(client.get("/v1/jobs"))
    service.token("root", "admin")
    answers.append(client.get("/v1/jobs", headers={"Origin": "https://evil.example", "X-Request-ID": "from-proxy.1"}))
    assert [answer.status_code for answer in answers] == [200, 404, 422, 413, 500, 401]
    for answer in answers:
        assert {name: answer.headers[name] for name in SECURITY} == SECURITY
        assert not [name for name in answer.headers if name.startswith("access-control-")]  # CORS is off
    numbers = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(numbers)) == 6 and numbers[-1] == "from-proxy.1" and numbers[4] in answers[4].text
    assert client.get("/v1/jobs", headers={"X-Request-ID": "two\twords"}).headers["x-request-id"] != "two\twords"


def test_pages_may_run_what_is_in_them_and_nothing_from_elsewhere(service: Secured) -> None:
    client = service.client()
    docs = client.get("/docs").headers["content-security-policy"]
    assert "script-src 'self' 'unsafe-inline'" in docs and "default-src 'none'" in docs
    report = client.get(f"/v1/jobs/{service.job()}/report").headers["content-security-policy"]
    assert "script-src 'unsafe-inline'" in report and "'self'" not in report and "frame-ancestors 'none'" in report


def test_cors_where_it_is_asked_for(tmp_path: Path) -> None:
    service = Secured(tmp_path, cors_origins="https://ours.example, https://other.example")
    client = service.client()
    for origin, known in (("https://ours.example", True), ("https://evil.example", False)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked = client.options("/v1/jobs", headers=headers | {"Access-Control-Request-Headers": "authorization"})
        assert (asked.headers.get("access-control-allow-origin") == origin) is known
        assert client.post("/v1/jobs", json=BODY, headers={"Origin": origin}).status_code == (201 if known else 403)
    service.close()
