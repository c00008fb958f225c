"""Clones, differences and retries by their routes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.service.fakes import write_record
from tests.service.rest import Service


def test_a_clone_is_the_job_with_changes(client: TestClient, body: dict[str, Any]) -> None:
    first = client.post("/v1/jobs", json=body | {"init": None}).json()
    patch = {"epochs": None, "steps": 7, "optimizer": {"lr": 0.5}, "method": {"mask_ratio": 0.5}}
    content = json.dumps(patch)
    response = client.post(
        f"/v1/jobs/{first['id']}:clone", content=content, headers={"content-type": "application/merge-patch+json"}
    )
    assert response.status_code == 201 and response.headers["location"] == f"/v1/jobs/{response.json()['id']}"
    second = response.json()
    assert second["state"] == "QUEUED" and second["id"] != first["id"]
    diff = client.get(f"/v1/jobs/{first['id']}/diff/{second['id']}").json()
    assert {d["path"]: (d.get("a"), d.get("b")) for d in diff["spec"]} == {
        "epochs": (1.0, None),
        "steps": (None, 7),
        "optimizer.lr": (first["spec"]["optimizer"]["lr"], 0.5),
        "method.mask_ratio": (None, 0.5),
    }
    assert diff["provenance"] == [] and client.get(f"/v1/jobs/{first['id']}/diff/{first['id']}").json()["spec"] == []
    assert client.get(f"/v1/jobs/{first['id']}/diff/job-none").status_code == 404


def test_runs_differ_in_what_they_were_made_of(service: Service, client: TestClient, body: dict[str, Any]) -> None:
    ids = [client.post("/v1/jobs", json=body).json()["id"] for _ in range(2)]
    for i, job_id in enumerate(ids):
        write_record(service.runs / job_id, "RUNNING")
        (service.runs / job_id / "provenance.json").write_text(json.dumps({"code": "abc", "packages": {"torch": i}}))
    found = client.get(f"/v1/jobs/{ids[0]}/diff/{ids[1]}").json()
    assert found["provenance"] == [{"path": "packages.torch", "a": 0, "b": 1}]


def test_a_clone_is_validated_and_has_its_key(client: TestClient, body: dict[str, Any]) -> None:
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    url, key = f"/v1/jobs/{job_id}:clone", {"Idempotency-Key": "again"}
    refused = client.post(url, json={"epohcs": 3})
    assert refused.status_code == 422 and refused.json()["errors"][0]["loc"] == ["epohcs"]
    assert client.post(url, json=[1]).status_code == 422
    first, same = (client.post(url, json={"seed": 1}, headers=key) for _ in range(2))
    assert (first.status_code, same.status_code) == (201, 200) and first.json()["id"] == same.json()["id"]
    assert client.post(url, json={"seed": 2}, headers=key).status_code == 409
    assert client.post("/v1/jobs/none:clone", json={}).status_code == 404
    assert client.post(url, json={}).json()["spec"] == first.json()["spec"] | {"seed": 0}


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED"])
def test_a_retry_goes_on_as_the_next_attempt(
    service: Service, client: TestClient, body: dict[str, Any], end: str
) -> None:
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    service.parts.reconciler.round()
    if end == "FAILED":
        write_record(service.runs / job_id, "FAILED", reason="a disk was full", step=5)
    else:
        client.post(f"/v1/jobs/{job_id}:cancel")
        write_record(service.runs / job_id, "STOPPED", step=5)
    service.ray.known[job_id] = "FAILED"
    service.parts.reconciler.round()
    assert client.get(f"/v1/jobs/{job_id}").json()["state"] == end
    for _ in range(2):
        job = client.post(f"/v1/jobs/{job_id}:retry").json()
        assert (job["state"], job["reason"], job["finished_at"]) == ("QUEUED", None, None)
    service.parts.reconciler.round()
    assert service.ray.submitted == [(job_id, 1), (job_id, 2)]
    write_record(service.runs / job_id, "SUCCEEDED", attempt=2, step=10)
    service.parts.reconciler.round()
    assert client.post(f"/v1/jobs/{job_id}:retry").status_code == 409
