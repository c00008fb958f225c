"""The SDK against answers of a service that is not there."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator

import httpx
import pytest

import service.client
from service.client import ApiError, Client

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> Client:
    return Client("http://manta", transport=httpx.MockTransport(handler))


def test_a_lost_answer_is_asked_for_under_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.client.time, "sleep", lambda _: None)
    keys: list[str] = []

    def flaky(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["idempotency-key"])
        if len(keys) < 3:
            raise httpx.ReadError("connection reset")
        return httpx.Response(201, json={"id": "job-1"})

    assert client(flaky).submit({"name": "x"})["id"] == "job-1"
    assert len(keys) == 3 and len(set(keys)) == 1


def test_a_list_is_one_request() -> None:
    def echo(request: httpx.Request) -> httpx.Response:
        return httpx.Response(201, json={"jobs": json.loads(request.content), "path": request.url.path})

    assert client(echo).submit_all([{"name": "a"}, {"name": "b"}]) == [{"name": "a"}, {"name": "b"}]


def test_a_refusal_is_not_repeated_and_reads_well() -> None:
    calls: list[str] = []
    problem = {
        "title": "The job cannot run",
        "status": 422,
        "detail": "method.name: got method 'mea'",
        "hint": "",
        "errors": [
            {"loc": ["method", "name"], "message": "did you mean 'mae'?", "hint": "GET /v1/methods"},
            {"loc": ["epohcs"], "message": "unknown", "hint": ""},
        ],
    }

    def refuse(request: httpx.Request) -> httpx.Response:
        calls.append(request.url.path)
        return httpx.Response(422, json=problem)

    with pytest.raises(ApiError) as caught:
        client(refuse).submit({})
    assert calls == ["/v1/jobs"] and caught.value.status == 422
    assert str(caught.value) == (
        "The job cannot run:\n  method.name: did you mean 'mae'? (GET /v1/methods)\n  epohcs: unknown"
    )


@pytest.mark.parametrize("text", ["<html>bad gateway</html>", "[]", '{"x": 1}'])
def test_an_answer_that_is_no_problem_document(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        client(lambda _: httpx.Response(502, text=text)).job("j")
    assert caught.value.status == 502 and text in str(caught.value)


@pytest.mark.parametrize(("status", "header", "waits"), [(429, "7", [7.0]), (503, "2", [2.0]), (503, None, [2.0])])
def test_what_may_be_asked_again_is_asked_when_the_service_says(
    monkeypatch: pytest.MonkeyPatch, status: int, header: str | None, waits: list[float]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(service.client.time, "sleep", slept.append)
    problem = {"title": "Later", "detail": "got too much", "hint": "wait", "code": "TooMany", "retryable": True}
    headers = {} if header is None else {"Retry-After": header}
    answers = iter([httpx.Response(status, json=problem, headers=headers), httpx.Response(201, json={"id": "j"})])
    assert client(lambda _: next(answers)).submit({}) == {"id": "j"} and slept == waits
    with pytest.raises(ApiError) as caught:  # who only looks decides by itself
        client(lambda _: httpx.Response(status, json=problem, headers=headers)).job("j")
    error = caught.value
    assert (error.code, error.reason, error.retryable) == ("TooMany", "got too much", True)
    assert str(error) == f"Later: got too much\n  wait\n  it may succeed after {waits[0]:g} s"


def test_nobody_there() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(ApiError, match="does not answer") as caught:
        client(refuse).job("j")
    assert caught.value.status == 0 and "manta up" in caught.value.hint


def test_jobs_walks_the_pages() -> None:
    def pages(request: httpx.Request) -> httpx.Response:
        cursor = int(request.url.params.get("cursor", 10))
        numbers = range(cursor - 1, max(cursor - 4, 0), -1)
        return httpx.Response(
            200, json={"jobs": [{"id": n} for n in numbers], "next": numbers[-1] if numbers[-1] > 1 else None}
        )

    assert [job["id"] for job in client(pages).jobs(limit=100)] == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert [job["id"] for job in client(pages).jobs(limit=3)] == [9, 8, 7]


def test_what_a_job_is_asked_for() -> None:
    def echo(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        asked = {"path": request.url.path, "body": body, "after": request.url.params.get("after")}
        return httpx.Response(200, json={"events": [asked]} | asked)

    answers = client(echo)
    assert answers.pause("j")["path"] == "/v1/jobs/j:pause"
    assert answers.retry("j")["path"] == "/v1/jobs/j:retry"
    cloned = answers.clone("j", {"steps": None})
    assert (cloned["path"], cloned["body"]) == ("/v1/jobs/j:clone", {"steps": None})
    assert answers.diff("j", "k")["path"] == "/v1/jobs/j/diff/k"
    assert answers.resume("j", max_duration="2h")["body"] == {"max_duration": "2h"}
    assert answers.events("j", after="3-70") == [{"path": "/v1/jobs/j/events", "body": None, "after": "3-70"}]


def test_wait_reports_each_state_and_ends_with_the_job() -> None:
    states = iter(["QUEUED", "RUNNING", "SUCCEEDED"])
    seen: list[str] = []
    answers = client(lambda _: httpx.Response(200, json={"state": next(states)}))
    assert answers.wait("j", lambda job: seen.append(job["state"]), poll_s=0)["state"] == "SUCCEEDED"
    assert seen == ["QUEUED", "RUNNING", "SUCCEEDED"]


def test_followed_logs_end_with_the_event() -> None:
    text = "id: 3\ndata: one\n\n: still here\n\nid: 7\ndata: two\n\nevent: end\ndata: \n\n"
    assert list(client(lambda _: httpx.Response(200, text=text)).follow_logs("j")) == ["one", "two"]


def test_followed_logs_go_on_behind_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.client.time, "sleep", lambda _: None)
    asked: list[str | None] = []

    class Broken(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"id: 3\ndata: one\n\n"
            raise httpx.ReadError("connection reset")

    def flaky(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("last-event-id"))
        if len(asked) == 1:
            return httpx.Response(200, stream=Broken())
        return httpx.Response(200, text="id: 7\ndata: two\n\nevent: end\ndata: \n\n")

    assert list(client(flaky).follow_logs("j")) == ["one", "two"]
    assert asked == [None, "3"]


def test_images_travel_as_base64_in_order() -> None:
    def echo(request: httpx.Request) -> httpx.Response:
        images = [base64.b64decode(text).decode() for text in json.loads(request.content)["images"]]
        return httpx.Response(200, json={"model": "m@1", "outputs": images})

    assert client(echo).predict("m", [b"a", b"b"]) == ["a", "b"]


def test_a_deployment_that_fails_says_why() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(202, json={"model": "m@1", "state": "DEPLOYING", "reason": None})
        return httpx.Response(200, json={"deployment": {"state": "FAILED", "reason": "no weights"}})

    with pytest.raises(ApiError, match="no weights"):
        client(answer).deploy("m", wait_s=5)
