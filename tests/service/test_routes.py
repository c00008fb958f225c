"""The REST contract, without Ray: what is answered, and how refusals look."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.service.fakes import write_record
from tests.service.rest import Service
from tests.toy_artifact import image, write_artifact
from tests.toy_search import TOY_SEARCH, toy_search
from workloads import catalog
from workloads.artifact import PICTURES


def test_submit_answers_a_stored_job(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post("/v1/jobs", json=body)
    assert response.status_code == 201
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["attempt"], job["method"], job["models"]) == ("QUEUED", 0, "mae", [])
    assert client.get(f"/v1/jobs/{job['id']}").json() == job
    assert [j["id"] for j in client.get("/v1/jobs").json()["jobs"]] == [job["id"]]


def test_one_key_one_job_also_at_once(client: TestClient, body: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "k1"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/jobs", json=body, headers=headers), range(16)))
    assert sorted(a.status_code for a in answers) == [200] * 15 + [201]
    assert len({a.json()["id"] for a in answers}) == 1
    other = client.post("/v1/jobs", json=body | {"epochs": 2}, headers=headers)
    assert other.status_code == 409 and "another body" in other.json()["detail"]


@pytest.mark.parametrize(
    ("change", "loc", "words"),
    [
        ({"method": {"name": "mea"}}, ["method", "name"], "did you mean 'mae'"),
        ({"epohcs": 1}, ["epohcs"], "'epochs'"),
        ({"model": {"name": "vot"}}, ["model", "name"], "'vit'"),
        ({"data": {"train": {"shards": "/none.tar"}}}, ["data", "train", "shards"], "/none.tar"),
        ({"data": {"train": {"shards": "train-0.tar"}}}, ["data"], "expected absolute ones"),
        ({"init": "mae.safetensors"}, ["init"], "expected absolute ones"),
        ({"model": {"name": "found/artifact"}}, ["model"], "expected absolute ones"),
        ({"model": {"name": "job:none"}}, ["model", "name"], "names no finished job"),
        (
            {"data": {"train": {"shards": "pipe:cat /x.tar", "epoch_samples": 80}}},
            ["data", "train", "shards"],
            "got `pipe:`, whose command would run on the cluster",
        ),
        ({"batch_size": "many"}, ["batch_size"], "valid integer"),
        ({"resources": {"workers": 8}, "batch_size": 8}, ["resources"], "expected at most 4"),
        (
            {"resources": {"custom_per_worker": {"h100": 1}}},
            ["resources"],
            "expected at most the 4 CPU and 0 h100 of a node",
        ),
        (
            {"resources": {"custom_per_worker": {"GPU": 1}}},
            ["resources", "custom_per_worker", "GPU", "[key]"],
            "that Ray does not use",
        ),
    ],
)
def test_a_job_that_cannot_run_is_refused(
    client: TestClient, body: dict[str, Any], change: dict[str, Any], loc: list[str], words: str
) -> None:
    response = client.post("/v1/jobs", json=body | change)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["errors"][0]["loc"] == loc and words in problem["errors"][0]["message"]
    assert {"type", "title", "status", "detail", "hint", "retryable"} <= problem.keys()
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_a_search_is_a_job(client: TestClient) -> None:
    response = client.post("/v1/jobs", json=toy_search().model_dump(mode="json"))
    assert response.status_code == 201
    job = response.json()
    assert (job["state"], job["method"], job["search"], job["found"]) == ("QUEUED", None, "zen_nas", None)
    assert [j["id"] for j in client.get("/v1/jobs").json()["jobs"]] == [job["id"]]
    report = client.get(f"/v1/jobs/{job['id']}/report")
    assert report.status_code == 200 and "Zen-NAS, Lin et al. 2021" in report.text


@pytest.mark.parametrize(
    ("change", "loc", "words"),
    [
        ({"model": {"name": "vit"}}, ["model"], "got unknown key 'model'"),
        ({"search": TOY_SEARCH | {"name": "zen"}}, ["search", "name"], "did you mean 'zen_nas'"),
        ({"search": TOY_SEARCH | {"budget": {"parameters": 9}}}, ["search", "budget", "parameters"], "at least 5,337"),
        ({"search": TOY_SEARCH | {"initial": "Super(3)"}}, ["search", "initial"], "at character 0"),
        (
            {"search": {"name": "mae_det", "initial": "[" * 50_000, "budget": {"layers": 9}}},
            ["search", "initial"],
            "at character 2",
        ),
        ({"islands": 2}, [], "got 1 workers for 2 islands"),
        ({"resources": {"workers": 8}}, ["resources"], "expected at most 4"),
        (
            {"search": TOY_SEARCH | {"budget": {"latency": {"ms": 1, "table": "t.json"}}}},
            ["search"],
            "expected absolute ones",
        ),
    ],
)
def test_a_search_that_cannot_run_is_refused(
    client: TestClient, change: dict[str, Any], loc: list[str], words: str
) -> None:
    response = client.post("/v1/jobs", json=toy_search().model_dump(mode="json") | change)
    assert response.status_code == 422
    problem = response.json()
    assert problem["errors"][0]["loc"] == loc and words in problem["errors"][0]["message"]


def test_searches_are_listed_with_their_papers_and_schemas(client: TestClient) -> None:
    listed = client.get("/v1/searches").json()["searches"]
    assert {"zen_nas", "mae_det"} <= {one["name"] for one in listed} == set(catalog.SEARCHES)
    for one in listed:
        entry = client.get(f"/v1/searches/{one['name']}").json()
        assert entry == one and "arXiv" in entry["paper"]
        assert entry["schema"]["properties"] and entry["summary"]
    assert "did you mean 'zen_nas'" in client.get("/v1/searches/zen_na").json()["detail"]


@pytest.mark.parametrize(("content", "status"), [("[1]", 422), ("{", 422), ("null", 422), ('"x"', 422)])
def test_bodies_that_are_no_job(client: TestClient, content: str, status: int) -> None:
    response = client.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


def test_pages(client: TestClient, body: dict[str, Any]) -> None:
    ids = [client.post("/v1/jobs", json=body | {"name": f"j{i}"}).json()["id"] for i in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        page = client.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["jobs"]]
        if (cursor := page["next"]) is None:
            break
    assert seen == ids[::-1]
    assert client.get("/v1/jobs?state=RUNNING").json()["jobs"] == []
    assert client.get("/v1/jobs?limit=0").status_code == 422


def test_cancel_is_idempotent_and_reaches_the_colon_route(client: TestClient, body: dict[str, Any]) -> None:
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    for _ in range(2):
        response = client.post(f"/v1/jobs/{job_id}:cancel")
        assert (response.status_code, response.json()["state"]) == (202, "CANCELLED")


def test_pause_and_resume(service: Service, client: TestClient, body: dict[str, Any]) -> None:
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    for verb, state in (("pause", "PAUSED"), ("pause", "PAUSED"), ("resume", "QUEUED"), ("resume", "QUEUED")):
        response = client.post(f"/v1/jobs/{job_id}:{verb}")
        assert (response.status_code, response.json()["state"]) == (202, state)
    assert client.get("/v1/jobs?state=PAUSED").json()["jobs"] == []
    service.parts.reconciler.round()
    write_record(service.runs / job_id, "FAILED", ran_s=7201.0, reason="got max_duration")
    service.parts.reconciler.round()
    for verb in ("pause", "resume"):
        refused = client.post(f"/v1/jobs/{job_id}:{verb}")
        assert refused.status_code == 409 and refused.headers["content-type"] == "application/problem+json"
        assert "which is FAILED" in refused.json()["detail"] and refused.json()["hint"]
    wrong = client.post(f"/v1/jobs/{job_id}:resume", json={"max_duration": "soon"})
    assert wrong.status_code == 422 and "expected seconds" in wrong.json()["detail"]


def test_events(service: Service, client: TestClient, body: dict[str, Any]) -> None:
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    first, *others = client.get(f"/v1/jobs/{job_id}/events").json()["events"]
    assert (first["kind"], first["message"], others) == ("queued", "accepted", [])
    assert first["time"].endswith("+00:00")
    service.parts.reconciler.round()
    later = client.get(f"/v1/jobs/{job_id}/events", params={"after": first["cursor"]}).json()["events"]
    assert [event["kind"] for event in later] == ["starting"]
    assert client.get(f"/v1/jobs/{job_id}/events?after=x").status_code == 422
    assert client.get("/v1/jobs/none/events").status_code == 404


def test_curve_logs_and_evaluations(service: Service, client: TestClient, body: dict[str, Any]) -> None:
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    assert client.get(f"/v1/jobs/{job_id}/metrics").json() == {"points": []}
    assert client.get(f"/v1/jobs/{job_id}/logs").text == f"last words of {job_id}"
    folder = service.runs / job_id
    service.parts.reconciler.round()
    write_record(folder, "SUCCEEDED", step=20, skipped=["a.tar: x at offset 3: no image"])
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "epoch": 0, "loss": 1.0}) + "\n" for s in (10, 20))
    )
    (folder / "log.txt").write_text("first\nsecond\n")
    assert client.get(f"/v1/jobs/{job_id}/evaluations").json() == {"evaluations": [], "online": []}
    (folder / "evaluations.json").write_text('[{"label": "knn"}]')
    (folder / "online.jsonl").write_text('{"step": 10, "label": "knn"}\n{"step": 20, "la')
    service.parts.reconciler.round()
    assert [p["step"] for p in client.get(f"/v1/jobs/{job_id}/metrics?after_step=10").json()["points"]] == [20]
    assert client.get(f"/v1/jobs/{job_id}/logs").text == "first\nsecond\n"
    followed = client.get(f"/v1/jobs/{job_id}/logs?follow=true").text
    assert followed == "id: 6\ndata: first\n\nid: 13\ndata: second\n\nevent: end\ndata: SUCCEEDED\n\n"
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert job["skipped"] == ["a.tar: x at offset 3: no image"] and job["evaluations"] == [{"label": "knn"}]
    results = client.get(f"/v1/jobs/{job_id}/evaluations").json()
    assert results == {"evaluations": [{"label": "knn"}], "online": [{"step": 10, "label": "knn"}]}


def test_a_report_of_a_job_in_any_state(service: Service, client: TestClient, body: dict[str, Any]) -> None:
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    queued = client.get(f"/v1/jobs/{job_id}/report")
    assert queued.headers["content-type"].startswith("text/html") and "QUEUED" in queued.text
    assert "He et al. 2022" in queued.text and "What the method draws" not in queued.text
    folder = service.runs / job_id
    service.parts.reconciler.round()
    write_record(folder, "SUCCEEDED", step=20)
    (folder / "metrics.jsonl").write_text('{"step": 10, "epoch": 0, "loss": 1.5, "lr": 0.1}\n')
    write_artifact(folder / "artifact", "encoder")
    (folder / "artifact" / PICTURES).write_bytes(image(0))
    service.parts.reconciler.round()
    done = client.get(f"/v1/jobs/{job_id}/report").text
    assert "SUCCEEDED" in done and "What the method draws" in done


@pytest.mark.parametrize(
    "path",
    ["/v1/jobs/none", "/v1/jobs/none/metrics", "/v1/jobs/none/report", "/v1/methods/none", "/v1/models/none", "/none"],
)
def test_what_is_not_there_is_a_problem_with_a_hint(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["hint"]


def test_catalog(client: TestClient) -> None:
    assert "mae" in [m["name"] for m in client.get("/v1/methods").json()["methods"]]
    mae = client.get("/v1/methods/mae").json()
    assert mae["defaults"]["mask_ratio"] == 0.75 and "2111.06377" in mae["paper"]
    assert mae["schema"]["additionalProperties"] is False
    assert client.get("/v1/evaluations/knn").json()["defaults"]["k"] == 20


def test_health_says_what_is_missing(service: Service, client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    deadline = time.monotonic() + 60
    while not service.parts.warm.is_set() and time.monotonic() < deadline:
        time.sleep(0.05)
    service.parts.reconciler.round()
    assert client.get("/readyz").status_code == 200
    service.ray.away = True
    service.parts.reconciler.round()
    response = client.get("/readyz")
    assert response.status_code == 503 and response.json()["missing"] == {"ray": "Ray does not answer"}


def test_docs_need_no_network(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "https://" not in page
    for path in ("/docs/static/swagger-ui-bundle.js", "/docs/static/swagger-ui.css", "/docs/static/favicon-32x32.png"):
        assert path in page and client.get(path).status_code == 200
    assert {"/v1/jobs", "/v1/jobs/{job_id}:cancel", "/v1/models/{name}:predict"} <= client.get("/openapi.json").json()[
        "paths"
    ].keys()


def test_a_body_above_the_limit_is_refused_unread(service: Service, client: TestClient) -> None:
    huge = str(service.parts.settings.max_body_bytes + 1)
    response = client.post("/v1/jobs", content=b"{}", headers={"content-length": huge})
    assert response.status_code == 413 and response.json()["hint"]


def test_an_unexpected_error_tells_nothing_but_its_number(service: Service, client: TestClient) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    service.parts.jobs.list = broken  # type: ignore[method-assign, assignment]
    response = client.get("/v1/jobs")
    assert response.status_code == 500 and "secret" not in response.text
    assert response.headers["content-type"] == "application/problem+json"
