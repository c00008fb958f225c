"""A POST whose data cannot be read now, or never: two answers that tell these apart."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from fastapi.testclient import TestClient

from workloads import preflight


def post(client: TestClient, body: dict[str, Any], shards: str, path: str = "/v1/jobs") -> Any:
    answer = client.post(path, json=body | {"data": {"train": {"shards": shards}}})
    return answer.status_code, answer.json()


@pytest.mark.parametrize("url", ["abfs://container/x/a.tar", "nowhere://x/a.tar", "s3:///a.tar"])
def test_what_nothing_can_read_is_refused(client: TestClient, body: dict[str, Any], url: str) -> None:
    status, problem = post(client, body, url)
    assert (status, problem["code"], problem["errors"][0]["loc"]) == (422, "InvalidSpec", ["data", "train", "shards"])
    assert "install what it takes" in problem["detail"]


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs?dry_run=true"])
def test_a_store_that_is_away_makes_it_a_matter_of_time(
    client: TestClient, body: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    status, problem = post(client, body, f"http://127.0.0.1:{port}/x/a.tar", path)
    assert (status, problem["code"], problem["retryable"]) == (503, "Unavailable", True)
    assert "got no answer for" in problem["detail"] and "submit it again" in problem["hint"]
    assert client.get("/v1/jobs").json()["jobs"] == []
