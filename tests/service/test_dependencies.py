"""Jobs that come after others: names in a list, what is waited for, and what becomes of children."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient

from service.decisions import Decision, decide
from service.dependencies import lost, named, references
from service.errors import InvalidSpec, NotFound
from service.principal import Principal
from service.store import Job, JobState
from tests.service.fakes import write_record
from tests.service.rest import Service
from tests.service.secured import BODY, Secured
from tests.toy_artifact import write_artifact
from tests.toy_search import TOY_SEARCH
from workloads.spec_any import parse_spec

STATES: list[JobState | None] = [None, *get_args(JobState)]


def held(**states: JobState | None) -> Decision:
    row = Job(id="j", state="QUEUED", held=True, attempt=0, stalled=0, best_step=0, step=0, origin="rest")
    return decide(row, None, None, 0.0, alive=False, fits=True, max_attempts=3, parents=states)


def test_every_pair_of_states_of_two_parents() -> None:
    for a, b in itertools.product(STATES, STATES):
        decision = held(a=a, b=b)
        if {a, b} & {"FAILED", "CANCELLED", None}:
            assert (decision.act, decision.state) == ("finish", "FAILED")
            assert decision.reason is not None and "which it comes after" in decision.reason and decision.hint
        elif a == b == "SUCCEEDED":
            assert decision == Decision("check", "QUEUED")
        else:
            open_ = [name for name, state in (("a", a), ("b", b)) if state != "SUCCEEDED"]
            assert decision == Decision("none", "QUEUED", f"waits for {', '.join(open_)}")


def test_the_reason_names_the_parent_and_the_way_on() -> None:
    assert lost({"a": "SUCCEEDED", "b": "CANCELLED"}) == (
        "b, which it comes after, is CANCELLED",
        "`manta retry b`, then retry this one",
    )
    assert lost({"a": "PAUSED"}) is None


def test_references_stand_anywhere() -> None:
    document = BODY | {"init": "job:a", "model": {"name": "job:b"}, "method": {"name": "dmae", "teacher": "job:a"}}
    assert references(parse_spec(document)) == ["job:a"[4:], "b"]
    assert references(parse_spec(BODY)) == []


def test_names_become_ids_of_earlier_entries() -> None:
    list_ = [
        {"name": "search"},
        {"name": "train", "model": {"name": "job:$search"}, "note": "$search"},
        {"name": "tune", "init": "job:$train", "after": ["$search", "job-9"]},
    ]
    found = named(list_, ["j0", "j1", "j2"])
    assert found[1] == {"name": "train", "model": {"name": "job:j0"}, "note": "$search"}
    assert found[2] == {"name": "tune", "init": "job:j1", "after": ["j0", "job-9"]}


@pytest.mark.parametrize(
    ("list_", "loc", "words"),
    [
        ([{"name": "a", "after": ["$b"]}, {"name": "b", "after": ["$a"]}], ["jobs", 0, "after", 0], "no earlier entry"),
        ([{"name": "b"}, {"name": "a", "init": "job:$a"}], ["jobs", 1, "init"], "expected one of b"),
        ([{"name": "a"}, {"name": "a"}, {"init": "job:$a"}], ["jobs", 2, "init"], "2 earlier entries"),
        ([{"name": "a", "after": ["$x"]}], ["after", 0], "no earlier entry of a list"),
    ],
)
def test_cycles_and_names_of_nobody(list_: list[dict[str, Any]], loc: list[str | int], words: str) -> None:
    with pytest.raises(InvalidSpec, match=words) as refused:
        named(list_, [f"j{i}" for i in range(len(list_))])
    assert [problem["loc"] for problem in refused.value.problems] == [loc]


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    secured = Secured(tmp_path)
    yield secured
    secured.close()


def finish(service: Service | Secured, job_id: str, state: Any) -> None:
    """The run ends, and the reconciler has seen it."""
    service.parts.reconciler.round()
    write_record(service.parts.settings.runs / job_id, state, reason="why")
    service.ray.known[job_id] = state
    service.parts.reconciler.round()


def test_a_child_waits_and_does_not_keep_others_waiting(secured: Secured) -> None:
    jobs, submissions, rounds = secured.parts.jobs, secured.parts.submissions, secured.parts.reconciler.round
    parent, _ = submissions.submit(BODY)
    child, _ = submissions.submit(BODY | {"after": [parent.id]})
    assert (child.state, child.reason, child.after) == ("QUEUED", f"waits for {parent.id}", [parent.id])
    other, _ = submissions.submit(BODY)
    rounds()
    assert secured.ray.submitted == [(parent.id, 1), (other.id, 1)]
    assert jobs.get(child.id).reason == f"waits for {parent.id}"
    finish(secured, parent.id, "SUCCEEDED")
    for _ in range(3):
        rounds()
    assert secured.ray.submitted[-1] == (child.id, 1) and jobs.get(child.id).reason is None


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED"])
def test_a_parent_that_is_lost_fails_its_children_until_both_are_retried(secured: Secured, end: str) -> None:
    jobs, submissions, rounds = secured.parts.jobs, secured.parts.submissions, secured.parts.reconciler.round
    parent, _ = submissions.submit(BODY)
    child, _ = submissions.submit(BODY | {"after": [parent.id]})
    grandchild, _ = submissions.submit(BODY | {"after": [child.id]})
    if end == "CANCELLED":
        jobs.cancel(parent.id)
        rounds()
    else:
        finish(secured, parent.id, "FAILED")
    rounds()
    rounds()
    for one, of in ((child, f"{parent.id}, which it comes after, is {end}"), (grandchild, f"{child.id}, which")):
        row = jobs.get(one.id)
        assert row.state == "FAILED" and row.reason is not None and row.reason.startswith(of) and row.attempt == 0
    with pytest.raises(InvalidSpec, match=f"is {end}"):
        submissions.submit(BODY | {"after": [parent.id]})
    for one in (parent, child):
        jobs.retry(one.id)
    rounds()
    attempt = jobs.get(parent.id).attempt
    assert jobs.get(child.id).reason == f"waits for {parent.id}" and attempt >= 1
    write_record(secured.parts.settings.runs / parent.id, "SUCCEEDED", attempt)
    for _ in range(4):
        rounds()
    assert jobs.get(child.id).state == "STARTING" and jobs.get(grandchild.id).state == "FAILED"


def test_parents_that_are_unknown_or_anothers_do_not_exist(secured: Secured) -> None:
    for name in ("one", "two"):
        secured.project(name)
    theirs = secured.job(project="one")
    by = Principal("eve", "two", "admin", "tok-1")
    for job_id in (theirs, "job-none"):
        with pytest.raises(NotFound, match=f"got job '{job_id}', which does not exist"):
            secured.parts.submissions.submit(BODY | {"after": [job_id]}, None, by, "two")
        for change in ({"init": f"job:{job_id}"}, {"model": {"name": f"job:{job_id}"}}):
            with pytest.raises(InvalidSpec, match="no weights that you may read"):
                secured.parts.submissions.submit(BODY | change, None, by, "two")
    assert [job.project for job in secured.parts.jobs.list(limit=9)] == ["one"]


def test_a_list_is_all_or_nothing(client: TestClient, body: dict[str, Any]) -> None:
    good = [body | {"name": "first", "register": "kept-free"}, body | {"name": "second", "init": "job:$first"}]
    for wrong, loc in (
        ([*good, body | {"epohcs": 1}], ["jobs", 2, "epohcs"]),
        ([good[0], good[1] | {"method": {"name": "mea"}}], ["jobs", 1, "method", "name"]),
        ([good[0], good[1] | {"data": {"trian": body["data"]["train"]}}], ["jobs", 1, "data"]),
    ):
        refused = client.post("/v1/jobs:batch", json=wrong)
        assert refused.status_code == 422 and refused.json()["errors"][0]["loc"] == loc, refused.json()
    assert client.get("/v1/jobs").json()["jobs"] == []
    assert client.post("/v1/jobs:batch", json=[]).status_code == 422
    headers = {"Idempotency-Key": "k"}
    first, again = (client.post("/v1/jobs:batch", json=good, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    ids = [[job["id"] for job in answer.json()["jobs"]] for answer in (first, again)]
    assert ids[0] == ids[1] and [job["id"] for job in client.get("/v1/jobs").json()["jobs"]] == ids[0][::-1]
    assert client.post("/v1/jobs:batch", json=good[:1], headers=headers).status_code == 409
    assert first.json()["jobs"][1]["after"] == [ids[0][0]]


def test_search_training_and_fine_tuning_are_one_list(
    service: Service, client: TestClient, body: dict[str, Any]
) -> None:
    """A child is checked when what it names is there: here the artifact's model does not fit the method."""
    list_ = [
        {"name": "search", "search": TOY_SEARCH},
        body | {"name": "train", "model": {"name": "job:$search"}, "method": {"name": "simclr"}},
        body | {"name": "tune", "init": "job:$train", "method": {"name": "linear_probe"}},
    ]
    jobs = client.post("/v1/jobs:batch", json=list_).json()["jobs"]
    assert [job["after"] for job in jobs] == [[], [jobs[0]["id"]], [jobs[1]["id"]]]
    assert jobs[1]["spec"]["model"] == {"name": f"job:{jobs[0]['id']}"}
    finish(service, jobs[0]["id"], "SUCCEEDED")
    service.parts.reconciler.round()
    train = client.get(f"/v1/jobs/{jobs[1]['id']}").json()
    assert train["state"] == "FAILED" and "names no finished job" in train["reason"]  # the search left no winner
    write_artifact(service.runs / jobs[0]["id"] / "artifact", "encoder")
    client.post(f"/v1/jobs/{jobs[1]['id']}:retry")
    for _ in range(2):
        service.parts.reconciler.round()
    assert client.get(f"/v1/jobs/{jobs[1]['id']}").json()["state"] == "STARTING"
