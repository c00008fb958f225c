"""Names of the registry: who may take one, and what a job reads by one that was nobody's when it came."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.errors import InvalidSpec
from service.principal import LOCAL
from service.store import Job
from tests.service.fakes import write_record
from tests.service.secured import BODY, Secured
from workloads import preflight

PUBLIC = "resnet18.a1_in1k"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Secured]:
    monkeypatch.setattr(preflight, "is_public", lambda name: name == PUBLIC)
    service = Secured(tmp_path)
    for name in ("ann", "bob"):
        service.project(name)
    service.token("root", "admin")
    yield service
    service.close()


def of(service: Secured, name: str) -> TestClient:
    """Of a submitter of the project that has its name."""
    return service.client(service.token(name, "submitter", name))


def after_parent(service: Secured, client: TestClient, **more: Any) -> str:
    """A job that is held until another of the same project has succeeded."""
    parent = client.post("/v1/jobs", json=BODY).json()["id"]
    service.parts.reconciler.round()
    held = client.post("/v1/jobs", json=BODY | more | {"after": [parent]})
    assert held.status_code == 201, held.json()
    write_record(service.settings.runs / parent, "SUCCEEDED")
    service.ray.known[parent] = "SUCCEEDED"
    return str(held.json()["id"])


def let_go(service: Secured, job_id: str) -> Job:
    for _ in range(3):
        service.parts.reconciler.round()
    return service.parts.jobs.get(job_id)


def test_a_held_job_does_not_start_from_weights_that_another_project_registers_meanwhile(service: Secured) -> None:
    spy = after_parent(service, of(service, "bob"), init="secret@1")
    service.model("secret", "ann")
    job = let_go(service, spy)
    assert (job.state, job.reason) == ("FAILED", "init: got 'secret@1', which names no weights that you may read")
    service.parts.jobs.retry(spy)
    assert let_go(service, spy).state == "FAILED"
    assert all(job_id != spy for job_id, _ in service.ray.submitted)


def test_nor_by_the_path_of_what_is_not_there_yet(service: Secured) -> None:
    path = str(service.settings.registry / "secret" / "1")
    refused = of(service, "bob").post("/v1/jobs", json=BODY | {"init": path})
    assert refused.status_code == 422 and "expected a path or URL below what is allowed" in refused.json()["detail"]


@pytest.mark.parametrize("project", ["bob", "ann"])
def test_a_held_job_starts_from_what_its_submitter_was_seen_to_may(service: Secured, project: str) -> None:
    """The project's own, by then or before; and of another one what was there, for who sees all projects."""
    if project == "ann":
        service.model("digits", "ann")
    client = of(service, "bob") if project == "bob" else service.client(service.token("root", "admin"))
    job_id = after_parent(service, client, init="digits@1")
    if project == "bob":
        service.model("digits", "bob")
    assert let_go(service, job_id).state == "STARTING"


def test_a_name_of_public_weights_is_nobodys(service: Secured) -> None:
    client = of(service, "ann")
    refused = client.post("/v1/jobs", json=BODY | {"register": PUBLIC})
    assert refused.status_code == 422 and refused.json()["errors"][0]["loc"] == ["register"]
    assert PUBLIC in refused.json()["detail"] and "timm" in refused.json()["detail"]
    assert of(service, "bob").post("/v1/jobs", json=BODY | {"init": PUBLIC}).status_code == 201
    service.model(PUBLIC, "ann")  # one that an older version let it take goes on
    assert client.post("/v1/jobs", json=BODY | {"register": PUBLIC}).status_code == 201


def test_a_refused_job_takes_no_name(service: Secured) -> None:
    ann, bob = of(service, "ann"), of(service, "bob")
    service.parts.projects.change(LOCAL, "bob", {"max_unfinished": 0})
    assert bob.post("/v1/jobs", json=BODY | {"register": "digits"}).status_code == 429
    assert ann.post("/v1/jobs", json=BODY | {"register": "digits"}).status_code == 201
    service.parts.projects.change(LOCAL, "bob", {"max_unfinished": None})
    list_ = [BODY | {"register": "faces"}, BODY | {"register": "digits"}]
    assert bob.post("/v1/jobs:batch", json=list_).json()["errors"][0]["loc"] == ["jobs", 1, "register"]
    assert service.parts.registry.owner("faces") is None


def test_of_two_lists_that_take_a_name_at_the_same_moment_one_is_refused_as_a_whole(
    service: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is free when both are looked at, and taken when the second is stored."""
    monkeypatch.setattr(service.parts.registry, "taken", lambda *_: [])
    service.parts.submissions.submit(BODY | {"register": "digits"}, None, LOCAL, "ann")
    with pytest.raises(InvalidSpec, match="another project has"):
        service.parts.submissions.submit_all([BODY, BODY | {"register": "digits"}], None, LOCAL, "bob")
    assert [job.project for job in service.parts.jobs.list(limit=9)] == ["ann"]


def test_a_dry_run_says_that_a_project_is_full(service: Secured) -> None:
    service.parts.projects.change(LOCAL, "bob", {"max_unfinished": 0})
    full = of(service, "bob").post("/v1/jobs?dry_run=true", json=BODY)
    assert (full.status_code, full.json()["code"]) == (429, "TooMany")
    assert "got 1 unfinished jobs of project bob, expected at most 0" in full.json()["detail"]
