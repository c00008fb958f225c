"""A job is a short document: names of shards belong into a pattern."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service import cli, client, documents, limits
from service.documents import MOST_BYTES, MOST_JOB_BYTES
from tests.service.fakes import local_client
from tests.service.secured import BODY, Secured

PATTERN = "/data/train-{000000..000999}.tar"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    yield service
    service.close()


def long(size: int) -> dict[str, Any]:
    """A job of that many bytes of JSON."""
    bare = BODY | {"data": {"train": {"shards": [""]}}}
    return bare | {"data": {"train": {"shards": ["/data/" + "x" * (size - len(json.dumps(bare)) - 6)]}}}


def test_a_job(service: Secured) -> None:
    client, too_long = service.client(), long(MOST_JOB_BYTES + 1)
    for path in ("/v1/jobs", "/v1/jobs?dry_run=true"):
        refused = client.post(path, json=too_long)
        assert refused.status_code == 413 and PATTERN in refused.json()["hint"]
        assert f"got a job of {MOST_JOB_BYTES + 1} bytes of JSON, expected at most" in refused.json()["detail"]
    job_id = client.post("/v1/jobs", json=BODY).json()["id"]
    assert client.post(f"/v1/jobs/{job_id}:clone", json={"data": too_long["data"]}).status_code == 413
    assert client.get("/v1/jobs").json()["jobs"][0]["id"] == job_id
    accepted = client.post("/v1/jobs", json=long(MOST_JOB_BYTES))
    assert accepted.status_code == 201


def test_a_list(service: Secured) -> None:
    client = service.client()
    third = long(MOST_JOB_BYTES)
    inside = client.post("/v1/jobs:batch", json=[BODY, long(MOST_JOB_BYTES + 1)])
    beyond = client.post("/v1/jobs:batch", json=[third] * 5)
    assert inside.status_code == beyond.status_code == 413
    assert f"expected at most {MOST_BYTES}" in beyond.json()["detail"] and PATTERN in beyond.json()["hint"]
    assert client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/tokens"])
def test_no_document_is_read_that_is_longer_than_a_list_may_be(service: Secured, path: str) -> None:
    headers = {"content-length": str(MOST_BYTES + 1)}
    assert service.client().post(path, content=b"{}", headers=headers).status_code == 413
    service.model("digits")
    images = service.client().post("/v1/models/digits:predict", content=b"{}", headers=headers)
    assert images.status_code == 409  # not deployed: of images more is taken


def test_the_command_line_tells_it(service: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.httpx, "Client", lambda headers, **_: local_client(service.app, **headers))
    monkeypatch.setenv("MANTA_URL", "http://manta")
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    cli._more_commands()
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps(long(2000)))
    for module, limit in ((documents, "MOST_JOB_BYTES"), (limits, "MOST_BYTES")):
        monkeypatch.setattr(module, limit, 1500)
        result = CliRunner().invoke(cli.app, ["submit", str(spec)])
        assert result.exit_code == 1 and PATTERN in result.stderr.replace("\n", ""), result.output
