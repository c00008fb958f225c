"""Requests that no client of ours sends: whatever comes, the answer is a typed problem and never a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.access import RULES
from tests.service.secured import BODY, Secured

KEYS = {"type", "title", "status", "code", "detail", "reason", "hint", "retryable"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """One for all: what it was asked before must not matter either."""
    service = Secured(tmp_path_factory.mktemp("odd"), requests_per_s=1e6, request_burst=1_000_000)
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: Secured) -> TestClient:
    return service.client(service.token("root", "admin"))


def expect(answer: httpx.Response, *status: int) -> dict[str, Any]:
    assert answer.status_code in status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = json.loads(answer.content.decode())  # UTF-8, or this raises
    assert problem.keys() >= KEYS and problem["status"] == answer.status_code
    assert problem["type"] == f"urn:manta:error:{problem['code']}" and problem["reason"] == problem["detail"]
    assert problem["retryable"] == ("retry-after" in answer.headers)
    return problem


def nested(depth: int, kind: str) -> str:
    return '{"a":' * depth + "1" + "}" * depth if kind == "objects" else '{"a":' + "[" * depth + "]" * depth + "}"


BAD_DOCUMENTS = [
    '{"x": "\\ud800"}',
    '{"\\udfff": 1}',
    '{"x": "a\\u0000b"}',
    '{"x": NaN}',
    '{"x": -Infinity}',
    '{"x": 1e999}',
    f'{{"x": {10**30}}}',
    f'{{"x": {"9" * 5000}}}',
    nested(100, "objects"),
    nested(100, "lists"),
    nested(100_000, "objects"),
    nested(100_000, "lists"),
    "{",
    "",
    "null",
    "[]",
    '"text"',
    '{"x": 1} {}',
]


@pytest.mark.parametrize("document", BAD_DOCUMENTS, ids=lambda text: text[:20])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs?dry_run=true", "/v1/jobs:batch", "/v1/jobs/{}:clone"])
def test_documents_that_no_database_or_program_would_take(
    service: Secured, client: TestClient, path: str, document: str
) -> None:
    job_id = service.job()
    content = f"[{document}]" if "batch" in path else document
    if content == "[[]]" or (content == "{}" and "clone" in path):
        pytest.skip("means something there")
    expect(client.post(path.format(job_id), content=content.encode(), headers=JSON), 400, 422)
    assert client.get("/v1/jobs?limit=1").json()["jobs"][0]["id"] == job_id


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": "inf"},
        {"epochs": "nan"},
        {"epochs": 1e308},
        {"epochs": None, "steps": 2**63 - 1},
        {"batch_size": 2**63 - 1},
        {"batch_size": 2**62, "resources": {"workers": 2**62, "cpus_per_worker": 2**62}},
        {"resources": {"gpus_per_worker": 1e308, "workers": 4}, "batch_size": 4},
        {"resources": {"workers": [1, 2, 3]}},
        {"max_duration": "9" * 400 + "d"},
        {"max_duration": 1e308},
        {"optimizer": {"lr": 1e400}},
        {"data": {"x" * 10_000: {"shards": "/data/x.tar"}}},
        {"data": {"train": {"shards": "/data/" + "x" * 10_000}}},
        {"data": {"train": {"shards": "/data/../../etc/passwd"}}},
        {"data": {"train": {"shards": "/data/{0..999999999999}.tar"}}},
        {"data": {"train": {"shards": []}}},
        {"after": ["$toy"]},
        {"after": ["job-none"]},
        {"init": "job:../../x"},
        {"method": {"name": ["mae"]}},
        {"model": {"name": "zennet", "structure": []}},
        {"model": {"name": "zennet", "structure": "SuperConvK3BNRELU(3," + "9" * 200 + ",1,1)"}},
        {"model": {"name": "maedet", "structure": "[" * 50_000}},
        {"name": "toy\n"},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_numbers_and_names_beyond_all_measure(service: Secured, client: TestClient, change: dict[str, Any]) -> None:
    """Also while Ray is away, so that nothing compares them with a cluster."""
    for away in (False, True):
        service.ray.away = away
        answer = client.post("/v1/jobs", content=json.dumps(BODY | change), headers=JSON)
        if answer.status_code != 201:
            expect(answer, 404, 422)
        assert client.get("/v1/jobs").status_code == 200


@pytest.mark.parametrize(
    "document", ['{"\\ud800": 1}', '{"name": "\\ud800"}', '{"name": "a\\u0000"}', '{"name": 1}', "[1]"]
)
def test_what_is_told_of_a_text_without_utf8_is_utf8(client: TestClient, document: str) -> None:
    for path in ("/v1/projects", "/v1/tokens", "/v1/models/x/deploy"):
        expect(client.post(path, content=document, headers=JSON), 422)


def test_the_last_of_two_equal_keys_counts(client: TestClient) -> None:
    assert client.post("/v1/projects", content='{"name": "one", "name": "two"}', headers=JSON).json()["name"] == "two"


@pytest.mark.parametrize(
    "query",
    [
        f"cursor={2**63}",
        f"cursor={10**400}",
        "cursor=1e3",
        "limit=-1",
        "limit=٣x",
        "state=%00",
        "state=%ff%fe",
        "project=%00",
        "project=a%0a",
        "limit=1&limit=x",
    ],
)
def test_parameters(client: TestClient, query: str) -> None:
    expect(client.get(f"/v1/jobs?{query}"), 422)
    if "cursor" in query:
        expect(client.get(f"/v1/audit?{query}"), 422)


def test_parameters_of_a_run_beyond_all_measure(service: Secured, client: TestClient) -> None:
    job_id = service.job()
    (service.settings.runs / job_id).mkdir(parents=True)
    (service.settings.runs / job_id / "log.txt").write_text("a\nb\n")
    (service.settings.runs / job_id / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n'
    )
    for query in (f"offset={2**63}", f"offset={10**30}", "limit=0", "level=LOUD", f"rank={2**64}", "follow=perhaps"):
        expect(client.get(f"/v1/jobs/{job_id}/logs?{query}"), 422)
    assert client.get(f"/v1/jobs/{job_id}/logs?offset={10**12}").text == ""
    expect(client.get(f"/v1/jobs/{job_id}/logs", headers={"Last-Event-ID": str(2**70)}), 422)
    for query in (f"after_step={2**64}", "after_step=-2", "max_points=3", "by=" + "x" * 81):
        expect(client.get(f"/v1/jobs/{job_id}/metrics?{query}"), 422)
    expect(client.get(f"/v1/jobs/{job_id}/events?after=%D9%A3-0"), 422)
    expect(client.get(f"/v1/jobs/{job_id}/events?after=0-0%0A"), 422)
    curve = client.get(f"/v1/jobs/{job_id}/metrics?by=%00")
    assert [point["loss"] for point in json.loads(curve.text, parse_constant=pytest.fail)["points"]] == [None, None]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/xml", "application/x-www-form-urlencoded", "x", "a/b; c=\xff"]
)
def test_a_body_of_another_type(client: TestClient, kind: str) -> None:
    for path in ("/v1/jobs", "/v1/jobs:batch", "/v1/projects"):
        problem = expect(
            client.post(path, content=json.dumps(BODY), headers={"Content-Type": kind.encode("latin-1")}), 415
        )
        assert "expected application/json" in problem["reason"]


def test_a_body_without_a_type_and_none_at_all(client: TestClient) -> None:
    expect(client.post("/v1/jobs", content=json.dumps(BODY)), 415)
    expect(client.post("/v1/jobs"), 422)


@pytest.mark.parametrize(
    "path", ["/v1/jobs/", "/v1/models/", "/v1", "/", "//v1/jobs", "/v1/jobs/a/b/c", "/v1/jobs/%2F", "/docs/"]
)
def test_paths_beside_the_routes(client: TestClient, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        problem = expect(client.request(method, path, follow_redirects=False), 404)
        assert problem["code"] == "NotFound" and problem["hint"]


@pytest.mark.parametrize(
    "path", ["/v1/jobs/%ff%fe", "/v1/jobs/%ED%A0%80", "/v1/jobs/%F0%9F%98%80", "/v1/jobs/" + "x" * 5000]
)
def test_paths_of_any_bytes(client: TestClient, path: str) -> None:
    expect(client.get(path), 404)
    expect(client.post(f"{path}:cancel"), 404)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/jobs", "GET, POST"),
        ("/v1/jobs/x", "GET"),
        ("/v1/jobs/x:cancel", "POST"),
        ("/v1/models/x/deploy", "DELETE, POST"),
        ("/v1/tokens/x", "DELETE"),
        ("/healthz", "GET"),
        ("/docs/static/swagger-ui.css", "GET, HEAD"),
    ],
)
def test_methods_that_a_path_does_not_have(client: TestClient, path: str, allowed: str) -> None:
    for method in ("PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        answer = client.request(method, path)
        assert expect(answer, 405)["code"] == "MethodNotAllowed" and answer.headers["allow"] == allowed


def test_headers_of_any_bytes(client: TestClient) -> None:
    for name in ("Idempotency-Key", "X-Request-ID", "Origin", "Accept", "Last-Event-ID"):
        answer = client.get("/v1/jobs", headers={name: b"\xff\xfe\x80"})
        assert answer.status_code == 200 and answer.headers["x-request-id"].isascii()
    again = [client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": b"\xc3\xa4\xff"}) for _ in range(2)]
    first, second = (answer.json() | {"queue": "what is ahead of it now"} for answer in again)
    assert [answer.status_code for answer in again] == [201, 200] and first == second
    expect(client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": ""}), 422)
    expect(client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k" * 201}), 422)
    expect(client.get("/v1/jobs", headers={"Authorization": b"Bearer \xff"}), 401)


def test_a_token_that_outlives_the_calendar(client: TestClient) -> None:
    for lifetime in (1e300, "9" * 300 + "d", 2**62, -1, True):
        body = {"name": "x", "role": "viewer", "lifetime": lifetime}
        expect(client.post("/v1/tokens", json=body), 422)
    assert client.get("/v1/tokens").status_code == 200


def test_no_route_answers_a_stranger_anything_but_a_problem(service: Secured, client: TestClient) -> None:
    stranger = service.client()
    for key, rule in RULES.items():
        method, path = key.split(" ")
        if rule.least is not None:
            assert expect(stranger.request(method, path, content=b"\xff", headers=JSON), 401)["code"] == "Unauthorised"
