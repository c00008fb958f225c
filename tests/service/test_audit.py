"""Every change is in the audit log: who, what, when, with which result; none is made without its entry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from service.store import AuditEntry
from tests.service.secured import BODY, Secured


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    yield service
    service.close()


def log(service: Secured) -> list[tuple[Any, ...]]:
    """The oldest first."""
    with service.store.session() as session:
        rows = session.query(AuditEntry).order_by(AuditEntry.id)
        return [(row.who, row.project, row.action, row.target, row.status) for row in rows]


def test_changes_and_refusals_are_there_and_looks_are_not(service: Secured) -> None:
    service.project("one")
    service.token("root", "admin")
    ann, eve = service.client(service.token("ann", "submitter", "one")), service.client(service.token("eve", "viewer"))
    job_id = ann.post("/v1/jobs", json=BODY).json()["id"]
    service.now += 5
    ann.post(f"/v1/jobs/{job_id}:pause")
    ann.post("/v1/jobs", json=BODY | {"epochs": -1})
    ann.post("/v1/jobs/job-none:cancel")
    eve.post(f"/v1/jobs/{job_id}:cancel")
    service.model("digits")
    eve.post("/v1/models/digits:predict", json={"images": []})
    ann.get("/v1/jobs")
    ann.post("/v1/jobs", content=b"{", headers={"content-type": "application/json"})  # no request at all
    service.client().post("/v1/jobs", json=BODY)  # nobody
    assert log(service) == [
        ("ann", "one", "POST /v1/jobs", job_id, 201),
        ("ann", "one", "POST /v1/jobs/{job_id}:pause", job_id, 202),
        ("ann", "one", "POST /v1/jobs", "", 422),
        ("ann", "one", "POST /v1/jobs/{job_id}:cancel", "job-none", 404),
        ("eve", "one", "POST /v1/jobs/{job_id}:cancel", job_id, 403),
    ]


def test_who_sees_it(service: Secured) -> None:
    service.project("one")
    root = service.client(service.token("root", "admin"))
    admin = service.client(service.token("eve", "admin", "one"))
    made = root.post("/v1/tokens", json={"name": "x", "role": "viewer", "project": "one"}).json()
    root.post("/v1/projects", json={"name": "two"})
    everything = root.get("/v1/audit").json()
    assert [(e["target"], e["project"], e["status"]) for e in everything["entries"]] == [
        ("two", "two", 201),
        (made["id"], "one", 201),
    ]
    assert everything["next"] is None and made["token"] not in str(everything)
    assert [e["target"] for e in admin.get("/v1/audit").json()["entries"]] == [made["id"]]
    page = root.get("/v1/audit?limit=1").json()
    assert [e["target"] for e in root.get(f"/v1/audit?cursor={page['next']}").json()["entries"]] == [made["id"]]
    entry = everything["entries"][1]
    assert (
        entry["who"] == "root" and entry["token_id"].startswith("tok-") and entry["time"] == "1970-01-12T13:46:40+00:00"
    )


def test_each_job_of_a_list_has_its_entry(service: Secured) -> None:
    bodies = [BODY | {"name": f"toy-{n}"} for n in range(20)]
    answer = service.client().post("/v1/jobs:batch", json=bodies)
    ids = [job["id"] for job in answer.json()["jobs"]]
    assert log(service) == [("local", "default", "POST /v1/jobs:batch", job_id, 201) for job_id in ids]
    with service.store.session() as session:
        assert {entry.request_id for entry in session.query(AuditEntry)} == {answer.headers["x-request-id"]}
    assert service.client().post("/v1/jobs:batch", json=[bodies[0], {}]).status_code == 422
    assert log(service)[20:] == [("local", "default", "POST /v1/jobs:batch", "", 422)]


def test_a_change_of_a_project_is_in_that_project(service: Secured) -> None:
    service.project("one")
    root, ann = (service.client(service.token(name, "admin", of)) for name, of in (("root", "*"), ("ann", "one")))
    quotas = {"max_running": 3}
    codes = [client.patch("/v1/projects/one", json=quotas).status_code for client in (root, ann)]
    codes += [client.patch("/v1/projects/two", json=quotas).status_code for client in (root, ann)]
    assert codes == [200, 403, 404, 404]
    action = "PATCH /v1/projects/{name}"
    assert log(service) == [
        ("root", "one", action, "one", 200),
        ("ann", "one", action, "one", 403),
        ("root", "default", action, "two", 404),
        ("ann", "one", action, "two", 404),
    ]


def test_a_token_for_a_project_that_one_does_not_see_is_noted_in_ones_own(service: Secured) -> None:
    for name in ("one", "two"):
        service.project(name)
    service.token("root", "admin")
    ann = service.client(service.token("ann", "admin", "one"))
    codes = [
        ann.post("/v1/tokens", json={"name": "x", "role": "viewer", "project": of}).status_code for of in ("two", "one")
    ]
    assert codes == [404, 201]
    assert [(project, status) for _, project, _, _, status in log(service)] == [("one", 404), ("one", 201)]


def test_the_number_of_a_request_leads_from_the_answer_to_the_entry(service: Secured) -> None:
    answer = service.client().post("/v1/jobs", json=BODY)
    with service.store.session() as session:
        entry = session.query(AuditEntry).one()
        assert (entry.request_id, entry.who, entry.token_id) == (answer.headers["x-request-id"], "local", None)


def test_the_entry_is_written_before_the_change(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a service which dies in between leaves an entry without a result."""
    seen = []
    submit = service.parts.submissions.submit

    def watched(*arguments: Any) -> Any:
        seen.extend(log(service))
        return submit(*arguments)

    monkeypatch.setattr(service.parts.submissions, "submit", watched)
    service.client().post("/v1/jobs", json=BODY)
    assert seen == [("local", "default", "POST /v1/jobs", "", None)]


def test_nothing_is_changed_that_cannot_be_written_down(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise OperationalError("INSERT", {}, Exception("disk full"))

    monkeypatch.setattr(service.parts.audit, "begin", away)
    answer = service.client().post("/v1/jobs", json=BODY)
    assert (answer.status_code, answer.json()["retryable"]) == (503, True) and "retry-after" in answer.headers
    assert service.client().get("/v1/jobs").json()["jobs"] == []


def test_a_change_that_is_made_is_answered_also_where_its_result_cannot_be_written(
    service: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("UPDATE", {}, Exception("disk full"))

    monkeypatch.setattr(service.parts.audit, "finish", away)
    assert service.client().post("/v1/jobs", json=BODY).status_code == 201
    assert log(service)[0][-1] is None


def test_a_bug_is_a_result_as_well(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(service.parts.submissions, "submit", broken)
    assert service.client().post("/v1/jobs", json=BODY).status_code == 500
    assert log(service)[0][-1] == 500


def test_the_same_key_is_another_job_in_another_project(service: Secured) -> None:
    service.project("one")
    client, headers = service.client(), {"Idempotency-Key": "k"}
    first = client.post("/v1/jobs", json=BODY, headers=headers)
    other = client.post("/v1/jobs?project=one", json=BODY | {"epochs": 2}, headers=headers)
    again = client.post("/v1/jobs", json=BODY, headers=headers)
    assert [a.status_code for a in (first, other, again)] == [201, 201, 200]
    assert first.json()["id"] == again.json()["id"] != other.json()["id"]
    assert [row[1] for row in log(service)] == ["default", "one", "default"]
