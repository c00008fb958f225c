"""What the SDK asks again and how long, over a transport and a clock that are played."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.client import ApiError, Client
from service.errors import InvalidToken
from service.retries import FOLLOW_S, PATIENCE_S, Retries

JOB = {"id": "j", "state": "RUNNING"}
FULL = {"title": "Later", "detail": "got too much", "hint": "wait", "code": "TooMany", "retryable": True}


class Played:
    """A service that answers by a function of the time, in seconds, and of the request."""

    def __init__(self, answer: Callable[[float, httpx.Request], httpx.Response]) -> None:
        self.now, self.pauses, self.asked = 0.0, list[float](), list[httpx.Request]()

        def handle(request: httpx.Request) -> httpx.Response:
            self.asked.append(request)
            return answer(self.now, request)

        self.client = Client(
            "http://manta",
            transport=httpx.MockTransport(handle),
            retries=lambda: Retries(self._sleep, lambda: self.now),
        )

    def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def away_until(seconds: float, answer: httpx.Response, status: int = 0) -> Played:
    """First the service is away, as its proxy says, or nobody listens; then it answers."""

    def at(now: float, _: httpx.Request) -> httpx.Response:
        if now >= seconds:
            return answer
        if not status:
            raise httpx.ConnectError("refused")
        return httpx.Response(status, text="<html>")

    return Played(at)


@pytest.mark.parametrize("status", [0, 502, 503, 504])
def test_a_submission_outlives_a_restart_and_says_so_once(status: int, caplog: pytest.LogCaptureFixture) -> None:
    played = away_until(45.0, httpx.Response(201, json=JOB), status)
    assert played.client.submit({}) == JOB
    assert len(caplog.messages) == 1 and "asked again for up to 60 s" in caplog.text
    assert played.pauses[-1] == 8.0 and len({request.headers["idempotency-key"] for request in played.asked}) == 1


def test_patience_has_an_end() -> None:
    played = away_until(float("inf"), httpx.Response(201))
    with pytest.raises(ApiError, match="does not answer"):
        played.client.submit({})
    assert PATIENCE_S - 8 <= played.now < PATIENCE_S


@pytest.mark.parametrize(("status", "header", "waits"), [(429, "7", 7.0), (503, "3", 3.0), (503, None, 2.0)])
def test_what_may_be_asked_again_is_asked_when_the_service_says(
    status: int, header: str | None, waits: float, caplog: pytest.LogCaptureFixture
) -> None:
    refused = httpx.Response(status, json=FULL, headers={} if header is None else {"Retry-After": header})
    played = Played(lambda now, _: httpx.Response(201, json=JOB) if now else refused)
    assert played.client.submit({}) == JOB and played.pauses == [waits] and "Later: got too much" in caplog.text
    played.now = 0.0
    with pytest.raises(ApiError) as caught:  # who only looks decides by itself
        played.client.job("j")
    error = caught.value
    assert (error.code, error.reason, error.retryable) == ("TooMany", "got too much", True)
    assert str(error) == f"Later: got too much\n  wait\n  it may succeed after {waits:g} s"


@pytest.mark.parametrize(("status", "header"), [(429, "60"), (409, None), (500, None)])
def test_a_full_project_and_what_is_refused_is_told_at_once(status: int, header: str | None) -> None:
    headers = {} if header is None else {"Retry-After": header}
    played = Played(lambda *_: httpx.Response(status, json=FULL, headers=headers))
    with pytest.raises(ApiError):
        played.client.submit({})
    assert played.pauses == [] and len(played.asked) == 1


def test_an_address_that_is_none_is_not_asked_again() -> None:
    with pytest.raises(ApiError, match="protocol") as caught:
        Client("manta:8000").submit({})
    assert not caught.value.retryable


def test_waiting_outlives_restarts_that_are_longer_than_what_has_not_begun() -> None:
    """Also one that begins while `on_update` asks."""
    seen: list[str] = []
    back_at = 0.0

    def at(now: float, request: httpx.Request) -> httpx.Response:
        if now < back_at:
            raise httpx.ConnectError("refused")
        if request.url.path.endswith("metrics"):
            return httpx.Response(200, json={"points": []})
        return httpx.Response(200, json=JOB | {"state": "SUCCEEDED" if now > 800 else "RUNNING"})

    def update(job: dict[str, Any]) -> None:
        nonlocal back_at
        seen.append(job["state"])
        if len(seen) in (2, 4):  # 3 is 2 once more
            back_at = played.now + 500.0
        played.client.metrics("j")

    played = Played(at)
    assert played.client.wait("j", update, poll_s=0)["state"] == "SUCCEEDED"
    assert seen == ["RUNNING"] * 4 + ["SUCCEEDED"]


def test_waiting_for_one_who_has_answered_ends_as_well() -> None:
    def at(now: float, _: httpx.Request) -> httpx.Response:
        if now or len(played.asked) > 1:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json=JOB)

    played = Played(at)
    with pytest.raises(ApiError, match="does not answer"):
        played.client.wait("j", poll_s=0)
    assert FOLLOW_S - 8 <= played.now < FOLLOW_S


class Broken(httpx.SyncByteStream):
    """A stream that breaks off behind what it holds; here in the middle of an event."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        raise httpx.ReadError("connection reset")


def streams(*answers: httpx.Response) -> Played:
    left = iter(answers)
    return Played(lambda *_: next(left))


def test_a_stream_is_one_over_many_connections() -> None:
    """Far more of them break than one waits for at once; two end as they should, one is refused for a while."""
    broken = [
        httpx.Response(200, stream=Broken(f"id: {n}\nda".encode(), f"ta: {n}\n\nid: 99\nda".encode())) for n in range(9)
    ]
    ended = [httpx.Response(200, text=text) for text in ("id: 9\r\ndata: 9\r\n\r\n", ": still here\n\nid: 12\n\n")]
    full = httpx.Response(429, json=FULL, headers={"Retry-After": "30"})
    last = httpx.Response(200, text="id: 20\ndata: two\ndata: lines\x0c\u2028\n\nevent: end\ndata: SUCCEEDED\n\n")
    played = streams(*broken, *ended, full, last)
    assert list(played.client.follow_logs("j", rank=3)) == [*map(str, range(10)), "two\nlines\x0c\u2028"]
    places = [request.headers.get("last-event-id") for request in played.asked]
    assert places == [None, *map(str, range(10)), "12", "12"]
    assert played.pauses == [0.5] * 11 + [30.0]
    assert {str(request.url.query) for request in played.asked} == {"b'rank=3&follow=true'"}


def test_points_and_events_are_followed_alike() -> None:
    end = "event: end\ndata: PAUSED\n\n"
    played = streams(
        httpx.Response(200, text='id: 5\ndata: {"step": 3}\n\n' + end),
        httpx.Response(200, text='id: 1-0\ndata: {"kind": "queued"}\n\n' + end),
    )
    assert list(played.client.follow_metrics("j", after_step=2)) == [{"step": 3}]
    assert list(played.client.follow_events("j")) == [{"kind": "queued"}]
    assert [request.url.path for request in played.asked] == ["/v1/jobs/j/metrics", "/v1/jobs/j/events"]


def test_a_revoked_token_ends_a_stream_for_good() -> None:
    problem = InvalidToken("got token tok-1, which is revoked", "ask an admin").problem()
    played = streams(httpx.Response(200, text=f"event: refused\ndata: {json.dumps(problem)}\n\n"))
    with pytest.raises(ApiError, match="revoked") as caught:
        list(played.client.follow_logs("j"))
    assert (caught.value.status, caught.value.code, played.pauses) == (401, "InvalidToken", [])


def test_a_stream_of_nobody_ends() -> None:
    played = away_until(float("inf"), httpx.Response(200))
    with pytest.raises(ApiError, match="does not answer"):
        list(played.client.follow_logs("j"))
    assert played.now < PATIENCE_S
