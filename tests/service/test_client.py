"""The SDK against answers of a service that is not there."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import httpx
import pytest

from service.client import ApiError, Client
from service.retries import Retries

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> Client:
    return Client("http://manta", transport=httpx.MockTransport(handler))


def test_a_lost_answer_is_asked_for_under_the_same_key() -> None:
    keys: list[str] = []

    def flaky(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["idempotency-key"])
        if len(keys) < 3:
            raise httpx.ReadError("connection reset")
        return httpx.Response(201, json={"id": "job-1"})

    patient = Client("http://manta", transport=httpx.MockTransport(flaky), retries=lambda: Retries(lambda _: None))
    assert patient.submit({"name": "x"})["id"] == "job-1"
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
