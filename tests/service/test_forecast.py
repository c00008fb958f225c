"""Dry runs by REST and by the command: what is answered, what is refused, and that nothing is stored."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from service import cli_dry_run
from service.store import Job, ModelName
from tests.service.fakes import write_record
from tests.service.rest import Service
from tests.toy_search import TOY_SEARCH

DRY = {"dry_run": "true"}


def rows(service: Service, table: Any) -> int:
    with service.parts.store.session() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def test_it_answers_and_stores_nothing(service: Service, client: TestClient, body: dict[str, Any]) -> None:
    response = client.post("/v1/jobs", params=DRY, json=body | {"register": "toy"})
    found = response.json()
    assert response.status_code == 200, found
    assert (found["method"], found["steps"], found["samples"], found["epoch_steps"]) == ("mae", 10, {"train": 80}, 10)
    assert found["flops"] == 10 * found["step_flops"] and found["state_bytes"] > 4 * found["parameters"]
    assert found["eta_s"] is found["decode_cores"] is found["eta_from"] is None
    assert rows(service, Job) == rows(service, ModelName) == 0
    peak = client.post("/v1/jobs", params=DRY | {"gpu": "H100"}, json=body).json()
    assert peak["eta_s"] == pytest.approx(found["flops"] / (67e12 * 0.4)) and "peak of 1 H100" in peak["eta_from"]
    assert client.post("/v1/jobs", params=DRY | {"gpu": "abacus"}, json=body).json()["eta_s"] is None


def test_earlier_runs_of_the_shape_tell_the_time(service: Service, client: TestClient, body: dict[str, Any]) -> None:
    ids = [client.post("/v1/jobs", json=body | change).json()["id"] for change in ({}, {"seed": 1}, {"batch_size": 16})]
    service.parts.reconciler.round()
    for job_id, seconds in zip(ids, ([9.0, 0.5, 0.5], [0.7], [30.0]), strict=True):
        write_record(service.runs / job_id, "RUNNING")
        points = [{"step": step, "step_time_s": s} for step, s in enumerate(seconds)]
        (service.runs / job_id / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    found = client.post("/v1/jobs", params=DRY | {"gpu": "H100"}, json=body | {"epochs": 2, "name": "other"}).json()
    assert found["step_time_s"] == pytest.approx(0.6) and found["eta_s"] == pytest.approx(12)
    assert found["earlier_runs"] == [ids[1], ids[0]] and found["eta_from"] == "earlier runs"
    assert found["decode_cores"] >= 1


@pytest.mark.parametrize(
    ("change", "loc"),
    [({"method": {"name": "mea"}}, ["method", "name"]), ({"batch_size": 96}, ["data"]), ({"lr": 1}, ["lr"])],
)
def test_what_cannot_run_is_refused_as_a_submission_is(
    client: TestClient,
    body: dict[str, Any],
    change: dict[str, Any],
    loc: list[str],
) -> None:
    response = client.post("/v1/jobs", params=DRY, json=body | change)
    assert response.status_code == 422 and response.headers["content-type"] == "application/problem+json"
    assert response.json()["errors"][0]["loc"] == loc


def test_a_search(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    found = client.post("/v1/jobs", params=DRY, json={"name": "s", "search": TOY_SEARCH}).json()
    assert found["search"] == "zen_nas" and found["candidates"] >= 120 and found["least"]["layers"] <= 10
    cli_dry_run.show(found, as_json=False)
    told = capsys.readouterr().out
    assert "budget of parameters\t200,000, the smallest has" in told and "no run of this shape" in told


def test_the_table_of_a_training(client: TestClient, body: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = client.post("/v1/jobs", params=DRY, json=body).json()
    cli_dry_run.show(found | {"eta_s": 7260.0, "eta_from": "earlier runs", "decode_cores": 3}, as_json=False)
    told = capsys.readouterr().out
    assert "steps\t10, 10 an epoch" in told and "samples of train\t80" in told
    assert "time\t2:01:00 by earlier runs" in told and "3 cores needed" in told
    cli_dry_run.show(found, as_json=True)
    assert json.loads(capsys.readouterr().out) == found
