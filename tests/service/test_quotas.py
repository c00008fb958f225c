"""Quotas and priorities over REST, preemption in the reconciler, and what the answer tells of the queue."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.errors import InvalidSpec, TooMany
from service.principal import LOCAL, Principal
from service.store import Job
from tests.service.fakes import local_client, write_record
from tests.service.secured import BODY, Secured
from tests.service.world import World
from workloads.record import RunFolder

GPU = {"resources": {"gpus_per_worker": 1}}


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    service.project("vision")
    service.ray.gpus = 4
    yield service
    service.close()


@pytest.fixture
def admin(secured: Secured) -> TestClient:
    return local_client(secured.app)


def test_quotas_are_set_shown_and_taken_away(secured: Secured, admin: TestClient) -> None:
    made = admin.post("/v1/projects", json={"name": "text", "max_gpus": 2, "share": 3})
    assert made.status_code == 201 and (made.json()["max_gpus"], made.json()["share"]) == (2, 3)
    changed = admin.patch("/v1/projects/text", json={"max_gpus": None, "max_running": 1}).json()
    assert (changed["max_gpus"], changed["max_running"], changed["share"]) == (None, 1, 3)
    for _ in range(2):
        secured.parts.submissions.submit(BODY | GPU, None, LOCAL, "text")
    secured.parts.reconciler.round()
    (text,) = (project for project in admin.get("/v1/projects").json()["projects"] if project["name"] == "text")
    assert text["used"] == {"gpus": 1.0, "running": 1, "unfinished": 2}
    assert admin.patch("/v1/projects/none", json={"max_running": 1}).status_code == 404
    for body in ({"max_running": -1}, {"share": 0}, {"max_gpu": 1}):
        assert admin.patch("/v1/projects/text", json=body).status_code == 422


def test_only_an_admin_of_all_projects_changes_quotas(secured: Secured) -> None:
    secured.token("root", "admin")
    for role, project in (("operator", "*"), ("admin", "vision")):
        client = secured.client(secured.token("eve", role, project))
        assert client.patch("/v1/projects/vision", json={"max_gpus": 99}).status_code == 403


def test_a_job_beyond_the_quota_is_refused_with_what_fits(secured: Secured, admin: TestClient) -> None:
    admin.patch("/v1/projects/vision", json={"max_gpus": 2})

    def refused(**resources: Any) -> str:
        with pytest.raises(InvalidSpec) as error:
            secured.parts.submissions.submit(BODY | {"resources": resources}, None, LOCAL, "vision")
        return f"{error.value.detail} ({error.value.hint})"

    said = "resources: got 4 GPUs, expected at most 2, the quota of project vision"
    assert refused(workers=4, gpus_per_worker=1) == f"{said} (resources.workers: 2 fits)"
    assert refused(workers=[1, 4], gpus_per_worker=1) == f"{said} (resources.workers: [1, 2] fits)"
    assert refused(gpus_per_worker=4) == f"{said} (resources.gpus_per_worker: 2 fits)"


def test_a_job_beyond_the_nodes_is_refused_with_what_fits(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 0.0}]
    monkeypatch.setattr(secured.ray, "nodes", lambda: nodes)

    def refused(**resources: Any) -> str:
        with pytest.raises(InvalidSpec) as error:
            secured.parts.submissions.submit(BODY | {"resources": resources, "batch_size": 64})
        return f"{error.value.detail} ({error.value.hint})"

    assert refused(gpus_per_worker=4).endswith("of a node (resources.gpus_per_worker: 2 fits)")
    assert refused(cpus_per_worker=65).endswith("(resources.cpus_per_worker: 64 fits)")
    assert refused(workers=4, gpus_per_worker=2).endswith("which this cluster holds (resources.workers: 2 fits)")
    assert refused(workers=[4, 8], gpus_per_worker=2).endswith("(resources.workers: [2, 2] fits)")
    three = {"workers": 2, "cpus_per_worker": 5, "gpus_per_worker": 1}  # by sums there would be room for more
    secured.parts.submissions.submit(BODY | {"resources": three})
    assert refused(workers=4, cpus_per_worker=5, gpus_per_worker=1).endswith("(resources.workers: 2 fits)")


def test_a_full_project_waits_or_asks(secured: Secured, admin: TestClient) -> None:
    admin.patch("/v1/projects/vision", json={"max_unfinished": 2})
    jobs = [secured.parts.submissions.submit(BODY, None, LOCAL, "vision")[0] for _ in range(2)]
    answer = admin.post("/v1/jobs?project=vision", json=BODY)
    assert (answer.status_code, answer.json()["retryable"], answer.headers["Retry-After"]) == (429, True, "60")
    with pytest.raises(TooMany, match="got 4 unfinished jobs of project vision, expected at most 2"):
        secured.parts.submissions.submit_all([BODY, BODY], None, LOCAL, "vision")
    assert admin.get("/v1/jobs?project=vision").json()["jobs"].__len__() == 2  # none of the list
    secured.parts.jobs.cancel(jobs[0].id)
    secured.parts.submissions.submit(BODY, None, LOCAL, "vision")
    secured.parts.submissions.submit(BODY)  # of another project
    again = admin.post(f"/v1/jobs/{jobs[0].id}:retry")
    assert (again.status_code, again.json()["detail"].split(",")[0]) == (429, "got 3 unfinished jobs of project vision")
    assert secured.parts.jobs.get(jobs[0].id).state == "CANCELLED"
    secured.parts.jobs.pause(jobs[1].id)
    admin.patch("/v1/projects/vision", json={"max_unfinished": 1})
    assert secured.parts.jobs.resume(jobs[1].id).state == "QUEUED"  # it was one of them all the time


def test_high_is_not_everybodys(secured: Secured) -> None:
    submitter = Principal("ann", "vision", "submitter", "tok-1")
    with pytest.raises(InvalidSpec, match="priority: got high of submitter ann"):
        secured.parts.submissions.submit(BODY | {"priority": "high"}, None, submitter, "vision")
    secured.parts.submissions.submit(BODY | {"priority": "low"}, None, submitter, "vision")
    operator = Principal("bob", "vision", "operator", "tok-2")
    job, _ = secured.parts.submissions.submit(BODY | {"priority": "high"}, None, operator, "vision")
    assert secured.parts.jobs.view(job)["priority"] == "high"


def test_place_reason_and_start_in_the_answer(secured: Secured, admin: TestClient) -> None:
    secured.ray.cpus = 1
    first = secured.job()
    done = secured.job()
    with secured.store.session() as session:  # an earlier run of the same work took 100 s
        row = session.query(Job).filter_by(id=done).one()
        row.state, row.started_at, row.finished_at = "SUCCEEDED", secured.now - 500, secured.now - 400
    secured.parts.reconciler.round()
    second, third = secured.job(), secured.job()
    secured.now += 3
    child = secured.parts.submissions.submit(BODY | {"after": [first]})[0].id
    assert admin.get(f"/v1/jobs/{first}").json()["queue"] is None

    def place(job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = admin.get(f"/v1/jobs/{job_id}").json()["queue"]
        return found

    assert place(second)["reason"] == "needs 1 CPU (0 free)"
    assert (place(second)["position"], place(third)["position"], place(third)["length"]) == (1, 2, 2)
    expected = [datetime.fromisoformat(place(one)["expected_start"]).timestamp() for one in (second, third)]
    assert expected == pytest.approx([1_000_100.0, 1_000_200.0])
    assert place(child) == {"position": None, "length": 2, "expected_start": None, "reason": f"waits for {first}"}
    secured.ray.away = True
    secured.now += 3
    assert place(second) == {"position": 1, "length": 2, "expected_start": None, "reason": "Ray does not answer"}


def test_a_burst_has_the_queue_read_seldom(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    standing, read = secured.parts.jobs._standing, 0

    def slow() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {}

    monkeypatch.setattr(standing, "_read", slow)
    now = iter(float(i) for i in range(1000))
    monkeypatch.setattr("service.standing.time.perf_counter", lambda: next(now))  # a reading takes a second
    views = [secured.parts.jobs.view(secured.parts.jobs.get(secured.job())) for _ in range(20)]
    assert read == 1 and views[-1]["queue"] == {
        "position": None, "length": 1, "expected_start": None, "reason": "came this moment",
    }  # fmt: skip


def test_the_steps_of_a_run_tell_when_it_ends(secured: Secured, admin: TestClient) -> None:
    secured.ray.cpus = 1
    first = secured.job()
    secured.parts.reconciler.round()
    second = secured.job()
    with secured.store.session() as session:
        row = session.query(Job).filter_by(id=first).one()
        row.state, row.step, row.total_steps = "RUNNING", 30, 90
    secured.now += 60
    start = admin.get(f"/v1/jobs/{second}").json()["queue"]["expected_start"]
    assert datetime.fromisoformat(start).timestamp() == pytest.approx(secured.now + 120)


@pytest.fixture
def preemptive(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, preemption=True)
    world.ray.cpus = 2
    yield world
    world.store.close()


def test_a_job_gives_way_and_goes_on_by_itself(preemptive: World) -> None:
    world = preemptive
    low, normal = (world.submissions.submit(BODY | {"priority": p})[0] for p in ("low", "normal"))
    world.reconciler.round()
    for job in (low, normal):
        write_record(world.folder(job), "RUNNING", step=5)
    world.reconciler.round()
    high, _ = world.submissions.submit(BODY | {"priority": "high"})
    for _ in range(3):
        world.reconciler.round()
    assert [world.state(job) for job in (low, normal, high)] == ["PAUSING", "RUNNING", "QUEUED"]
    assert RunFolder(world.folder(low)).stop.exists() and world.ray.stopped[0] == low.id
    world.stopped(low, step=7)
    for _ in range(2):
        world.reconciler.round()
    assert [world.state(job) for job in (low, normal, high)] == ["QUEUED", "RUNNING", "STARTING"]
    later, _ = world.submissions.submit(BODY | {"priority": "low"})
    assert world.jobs.resume(low.id).resumed_at is None  # it stands in the queue already, where it came
    write_record(world.folder(high), "SUCCEEDED")
    world.status(high, "SUCCEEDED")
    for _ in range(2):
        world.reconciler.round()
    assert (world.state(low), world.jobs.get(low.id).attempt, world.state(later)) == ("STARTING", 2, "QUEUED")
    messages = [event["message"] for event in world.jobs.events(low.id)]
    assert f"gives way to {high.id}, whose priority is higher" in messages
    assert "gave way, and goes on from its checkpoint" in messages


@pytest.mark.parametrize(("verb", "state"), [("pause", "PAUSED"), ("cancel", "CANCELLED")])
def test_what_a_user_asks_of_a_job_that_gives_way_stands(preemptive: World, verb: str, state: str) -> None:
    world = preemptive
    low, _ = world.submissions.submit(BODY | {"priority": "low", "resources": {"cpus_per_worker": 2}})
    world.reconciler.round()
    write_record(world.folder(low), "RUNNING")
    high, _ = world.submissions.submit(BODY | {"priority": "high"})
    world.reconciler.round()
    assert world.state(low) == "PAUSING"
    getattr(world.jobs, verb)(low.id)
    world.stopped(low)
    world.reconciler.round()
    world.reconciler.round()
    assert (world.state(low), world.state(high)) == (state, "STARTING")


def test_nobody_gives_way_unless_it_is_switched_on(world: World) -> None:
    world.ray.cpus = 1
    low, _ = world.submissions.submit(BODY | {"priority": "low"})
    world.reconciler.round()
    high, _ = world.submissions.submit(BODY | {"priority": "high"})
    world.reconciler.round()
    assert (world.state(low), world.state(high)) == ("STARTING", "QUEUED")
