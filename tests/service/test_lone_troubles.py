"""What goes wrong with one job is that job's alone: its user reads why, and the others go on."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm.exc import StaleDataError

from service.decisions import CHECKING, MAX_CHECKS, Decision
from service.store import Job
from tests.service.fakes import Inline, write_record
from tests.service.world import BODY, World
from workloads.preflight import Problem
from workloads.record import RunFolder
from workloads.spec import JobSpec


class Later(Inline):
    """Runs what it was given when it is told to."""

    def __init__(self) -> None:
        self.given: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(fn(*args, **kwargs))

        self.given.append(run)
        return future

    def run(self) -> None:
        while self.given:
            self.given.pop(0)()


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def child_of_a_success(world: World) -> Job:
    parent, _ = world.submissions.submit(BODY)
    child, _ = world.submissions.submit(BODY | {"after": [parent.id]})
    world.reconciler.round()
    write_record(world.folder(parent), "SUCCEEDED")
    world.status(parent, "SUCCEEDED")
    world.reconciler._settle(world.jobs.get(parent.id), "SUCCEEDED", False, {})
    return child


@pytest.mark.parametrize(
    "error", [ImportError("no adlfs"), ValueError("got a NUL \0"), OSError("disk full"), KeyError("x"), TypeError()]
)
def test_whatever_is_raised_for_one_job_becomes_its_reason_and_the_next_one_starts(
    world: World, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (world.submissions.submit(BODY)[0] for _ in range(2))
    submit = world.ray.submit

    def refuses_the_first(job_id: str, attempt: int) -> None:
        if job_id == first.id:
            raise error
        submit(job_id, attempt)

    monkeypatch.setattr(world.ray, "submit", refuses_the_first)
    for _ in range(3):
        world.reconciler.round()
    assert world.ray.submitted == [(second.id, 1)]
    told = world.jobs.get(first.id)
    assert told.state == "STARTING" and told.reason is not None
    assert told.reason.startswith(f"the service could not go on with it and tries again: {type(error).__name__}")
    monkeypatch.undo()
    world.reconciler.round()
    assert world.jobs.get(first.id).reason is None and (first.id, 1) in world.ray.submitted


def test_what_goes_wrong_again_and_again_is_written_and_logged_once(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = world.submissions.submit(BODY)
    monkeypatch.setattr(world.ray, "submit", raising(RuntimeError("a fault of ours")))
    revisions = []
    for _ in range(3):
        world.reconciler.round()
        revisions.append(world.jobs.get(job.id).revision)
    assert len(set(revisions)) == 1
    assert [record.exc_info is not None for record in caplog.records if "a fault of ours" in record.message] == [True]


def test_without_its_database_a_round_ends_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        world.submissions.submit(BODY)
    asked = []

    def away(job: Job, *_: Any) -> None:
        asked.append(job.id)
        raise OperationalError("SELECT", {}, Exception("the server closed the connection"))

    monkeypatch.setattr(world.reconciler, "_settle", away)
    with pytest.raises(OperationalError):
        world.reconciler.round()
    assert len(asked) == 1


def test_a_check_that_cannot_be_made_is_made_again_and_its_user_knows(world: World) -> None:
    job = child_of_a_success(world)
    world.check = raising(ImportError("no adlfs"))
    world.reconciler.round()
    assert world.jobs.get(job.id).reason == "could not be checked (ImportError: no adlfs); tried again soon"
    world.check = lambda *_: []
    world.reconciler.round()
    assert world.jobs.get(job.id).held  # 2 s are not over
    world.now += 2
    for _ in range(2):
        world.reconciler.round()
    started = world.jobs.get(job.id)
    assert (started.state, started.reason) == ("STARTING", None)


def test_it_is_given_up_after_some_tries_and_a_retry_begins_anew(world: World) -> None:
    job = child_of_a_success(world)
    world.check, rounds = raising(OSError("the bucket is gone")), 0
    while world.state(job) == "QUEUED":
        world.reconciler.round()
        world.now, rounds = world.now + 60, rounds + 1
    failed = world.jobs.get(job.id)
    assert (failed.state, rounds) == ("FAILED", MAX_CHECKS)
    assert failed.reason == f"could not be checked (OSError: the bucket is gone), {MAX_CHECKS} times in a row"
    assert failed.hint == f"mend it, then `manta retry {job.id}`"
    world.jobs.retry(job.id)
    world.reconciler.round()
    assert world.state(job) == "QUEUED"  # which is the first of as many


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, checkers=Later())
    yield world
    world.store.close()


def checkers(world: World) -> Later:
    assert isinstance(world.checkers, Later) and isinstance(world.checkers, Executor)
    return world.checkers


def test_a_check_that_takes_long_keeps_nobody_else_waiting(slow: World) -> None:
    job = child_of_a_success(slow)
    slow.reconciler.round()
    assert slow.jobs.get(job.id).reason == CHECKING
    other, _ = slow.submissions.submit(BODY)
    slow.reconciler.round()
    assert (slow.state(job), slow.state(other), len(checkers(slow).given)) == ("QUEUED", "STARTING", 1)
    slow.reconciler._wake.clear()
    checkers(slow).run()
    assert slow.reconciler._wake.is_set()
    for _ in range(2):
        slow.reconciler.round()
    assert slow.state(job) == "STARTING"


def test_what_a_check_found_for_a_job_that_was_cancelled_meanwhile_is_nobodys(slow: World) -> None:
    job = child_of_a_success(slow)
    slow.reconciler.round()
    slow.jobs.cancel(job.id)
    slow.reconciler.round()
    slow.jobs.retry(job.id)
    slow.check = lambda *_: [Problem(loc=["data"], message="it changed")]
    slow.reconciler.round()
    assert len(checkers(slow).given) == 2  # the first one is not made any more
    checkers(slow).run()
    slow.reconciler.round()
    failed = slow.jobs.get(job.id)
    assert (failed.state, failed.reason) == ("FAILED", "data: it changed")


def test_folders_whose_names_no_job_can_have_are_skipped_with_one_warning(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path, database_url=database)
    names = ["x" * 81, b"caf\xe9".decode("utf-8", "surrogateescape"), "z" * 80]
    for name in names:
        folder = world.settings.runs / name
        folder.mkdir(parents=True)
        write_record(folder, "RUNNING") if name.isalnum() else (folder / "record.json").write_text("{}")
        (folder / "job.json").write_text(JobSpec.model_validate(BODY).model_dump_json())
    job, _ = world.submissions.submit(BODY)
    for _ in range(2):
        world.reconciler.round()
    assert world.state(job) == "STARTING" and {row.id for row in world.jobs.list(limit=9)} == {job.id, "z" * 80}
    assert sum("is not followed" in record.message for record in caplog.records) == 2
    world.store.close()


# Row versions: what was decided from a row that has changed since is not done.


def changed_meanwhile(world: World) -> tuple[Job, Job]:
    """A job as the reconciler read it, and as it was written then."""
    job, _ = world.submissions.submit(BODY)
    read = world.jobs.get(job.id)
    world.jobs.pause(job.id)
    world.jobs.resume(job.id)
    return read, world.jobs.get(job.id)


def test_an_attempt_that_was_decided_from_an_older_row_is_not_begun(world: World) -> None:
    read, now = changed_meanwhile(world)
    run = RunFolder(world.folder(read))
    with pytest.raises(StaleDataError):
        world.reconciler._attempts.submit(read, run, None, again=False)
    found = world.jobs.get(read.id)
    assert (found.state, found.attempt, found.revision) == ("QUEUED", 0, now.revision)
    assert world.ray.submitted == [] and not run.path.exists()


def test_a_state_that_was_decided_from_an_older_row_is_not_written(world: World) -> None:
    read, now = changed_meanwhile(world)
    with pytest.raises(StaleDataError):
        world.reconciler._write(read, Decision("finish", "FAILED", "why"), None)
    found = world.jobs.get(read.id)
    assert (found.state, found.reason, found.revision) == ("QUEUED", None, now.revision)


def test_a_trouble_with_an_older_row_is_not_told(world: World) -> None:
    read, now = changed_meanwhile(world)
    world.reconciler._tell(read, OSError("of before"))
    assert world.jobs.get(read.id).reason == now.reason is None


def test_the_parents_of_a_long_list_are_asked_for_within_the_limits_of_sql(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here 40 variables in place of SQLite's 32,766 and PostgreSQL's 65,535."""
    monkeypatch.setattr("service.reconciler.AT_ONCE", 30)
    parent, _ = world.submissions.submit(BODY)
    children = []
    for _ in range(3):
        with world.store.session() as session:
            ids = [f"gone-{len(children)}-{i}" for i in range(30)]
            child = Job(id=f"c{len(children)}", name="n", spec=BODY, after=[parent.id, *ids], held=True, origin="rest")
            child.become("QUEUED", "accepted")
            session.add(child)
            children.append(child.id)

    def lower(connection: Any, *_: Any) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 40)

    world.store.engine.dispose()
    sa.event.listen(world.store.engine, "connect", lower)
    world.reconciler.round()
    assert [world.jobs.get(child).state for child in children] == ["FAILED"] * 3
