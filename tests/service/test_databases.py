"""What the service does with its database, on SQLite and on PostgreSQL: life cycle, races, tokens, audit, pages."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from service.audit import Audit
from service.errors import Conflict, InvalidToken
from service.principal import ALL, LOCAL
from service.projects import Projects
from service.registry import Registry, claim
from service.store import Job
from service.tokens import Tokens, new_text
from tests.service.fakes import write_record
from tests.service.world import BODY, World
from tests.toy_artifact import write_artifact


@pytest.fixture
def world(database: str, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, database_url=database)
    yield world
    world.store.close()


def at_once(count: int, call: Callable[[int], object]) -> list[object]:
    """What each of the calls returned, or raised."""
    together = threading.Barrier(count)

    def one(i: int) -> object:
        together.wait()
        try:
            return call(i)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def succeed(world: World, job: Job) -> None:
    write_artifact(world.folder(job) / "artifact", "encoder")
    write_record(world.folder(job), "SUCCEEDED", world.jobs.get(job.id).attempt, step=5, finished_at=9.0)
    world.status(job, "SUCCEEDED")


def test_the_life_of_jobs_that_wait_for_each_other(world: World) -> None:
    first = BODY | {"name": "first", "register": "m", "evaluate": []}
    jobs, _ = world.submissions.submit_all([first, BODY | {"after": ["$first"]}, BODY | {"after": ["$first"]}])
    world.reconciler.round()
    assert [world.state(job) for job in jobs] == ["STARTING", "QUEUED", "QUEUED"]
    write_record(world.folder(jobs[0]), "RUNNING", step=2)
    world.reconciler.round()
    assert (world.state(jobs[0]), world.jobs.get(jobs[0].id).step) == ("RUNNING", 2)
    succeed(world, jobs[0])
    for _ in range(3):
        world.reconciler.round()
    assert [world.state(job) for job in jobs] == ["SUCCEEDED", "STARTING", "STARTING"]
    view = world.jobs.view(world.jobs.get(jobs[0].id))
    assert view["models"] == ["m@1"] and view["finished_at"] == "1970-01-01T00:00:09+00:00"
    assert world.kinds(jobs[0]) == ["queued", "starting", "running", "succeeded"]
    world.jobs.pause(jobs[1].id)
    world.stopped(jobs[1], step=1)
    world.reconciler.round()
    world.jobs.cancel(jobs[2].id)
    world.stopped(jobs[2])
    world.reconciler.round()
    world.jobs.resume(jobs[1].id, max_duration=60)
    assert [world.state(job) for job in jobs] == ["SUCCEEDED", "QUEUED", "CANCELLED"]
    assert world.jobs.get(jobs[1].id).spec["max_duration"] == 60
    cursor = world.jobs.events(jobs[1].id)[1]["cursor"]
    assert [e["kind"] for e in world.jobs.events(jobs[1].id, cursor)] == ["pausing", "paused", "queued"]


def test_a_spec_comes_back_as_it_was(world: World) -> None:
    spec = {"a": [1, 1.5, None, True, "ü\u2028\\u0041"], "z": {"b": 1e-300, "a": 12345678901234567890}, "empty": {}}
    with world.store.session() as session:
        session.add(Job(id="j", name="n", spec=spec, origin="rest", state="QUEUED", held=True))
    row = world.jobs.get("j")
    assert json.dumps(row.spec, sort_keys=True) == json.dumps(spec, sort_keys=True) and row.held is True


def test_requests_and_rounds_at_once_leave_one_true_state(world: World) -> None:
    """A dozen threads cancel, pause and reconcile the same job: none fails, its events tell one way through."""
    job = world.submissions.submit(BODY)[0]
    world.reconciler.round()
    calls = (lambda: world.jobs.cancel(job.id), lambda: world.jobs.pause(job.id), world.reconciler.round)
    found = at_once(12, lambda i: calls[i % 3]())
    assert {type(one) for one in found} <= {Job, type(None), Conflict}
    assert world.state(job) == "CANCELLING"
    kinds = world.kinds(job)
    assert kinds[:2] == ["queued", "starting"] and kinds[-1] == "cancelling"
    assert kinds[2:-1] in ([], ["pausing"]) and world.ray.submitted == [(job.id, 1)]


def test_a_number_that_was_rolled_back_leaves_a_gap_and_pages_go_on(world: World) -> None:
    with pytest.raises(IntegrityError), world.store.session() as session:
        session.add(Job(id="a", name="n", spec={}, origin="rest", state="QUEUED"))
        session.flush()
        session.add(Job(id="a", name="n", spec={}, origin="rest", state="QUEUED"))
    ids = [world.submissions.submit(BODY)[0].id for _ in range(5)]
    seen, before = [], None
    while page := world.jobs.list(limit=2, before=before, project="default", state="QUEUED"):
        seen += [job.id for job in page]
        before = page[-1].number
    assert seen == ids[::-1]


def test_versions_and_names_in_the_registry(world: World, tmp_path: Path) -> None:
    registry, artifact = Registry(world.settings, world.store), write_artifact(tmp_path / "a", "encoder")
    assert [registry.register("m", artifact, f"j{i}", "artifact").version for i in (1, 2, 1)] == [1, 2, 1]
    assert registry.newest()[0].card["kind"] == "encoder"

    def claimed(i: int) -> list[str]:
        with world.store.session() as session:
            return claim(session, ["name", "m"], f"p{i}")

    taken = at_once(8, claimed)
    assert sorted(map(len, taken)) == [1] + [2] * 7  # type: ignore[arg-type]


def test_tokens_projects_and_the_audit_log(world: World) -> None:
    tokens, audit = Tokens(world.store, clock=lambda: 100.0), Audit(world.store, lambda: 100.0)
    text = new_text()
    found = at_once(8, lambda _: tokens.create(LOCAL, "ann", "admin", ALL, None, text))
    assert [type(one) for one in found].count(IntegrityError) == 7  # one hash, one token
    made, short = tokens.create(LOCAL, "bot", "viewer", ALL, 10)
    assert tokens.authenticate(text).name == "ann" and tokens.authenticate(short).token_id == made.id
    assert tokens.revoke(LOCAL, made.id).revoked_at == 100.0
    with pytest.raises(InvalidToken, match="revoked"):
        tokens.authenticate(short)
    found = at_once(6, lambda _: Projects(world.store).create(LOCAL, "vision"))
    assert [type(one) for one in found].count(Conflict) == 5
    numbers = at_once(10, lambda i: audit.begin(LOCAL, "POST /v1/jobs", f"j{i}", "default", f"r{i}"))
    at_once(10, lambda i: audit.finish(numbers[i], 200 + i))  # type: ignore[arg-type]
    entries = audit.list(LOCAL, limit=4)
    older = audit.list(LOCAL, limit=100, before=entries[-1].id)
    assert [e.id for e in (*entries, *older)] == sorted(numbers, reverse=True)  # type: ignore[type-var]
    assert {(e.request_id, e.status) for e in (*entries, *older)} == {(f"r{i}", 200 + i) for i in range(10)}
