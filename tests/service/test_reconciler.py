"""The life of jobs under a Ray that forgets, lies and goes away, and a service that crashes."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import Conflict, Unavailable
from service.ray_jobs import RayStatus, submission_id
from service.store import TERMINAL, Job
from tests.service.fakes import write_record
from tests.service.lives import Crash
from tests.service.world import BODY, World
from workloads.record import RunFolder
from workloads.spec import JobSpec


def test_the_plain_life(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    assert world.state(job) == "QUEUED"
    world.reconciler.round()
    assert world.state(job) == "STARTING"
    assert JobSpec.model_validate_json((world.folder(job) / "job.json").read_text()).name == "toy"
    write_record(world.folder(job), "RUNNING", step=7, total_steps=20)
    world.reconciler.round()
    assert (world.state(job), world.jobs.get(job.id).step) == ("RUNNING", 7)
    write_record(world.folder(job), "SUCCEEDED", step=20, total_steps=20)
    world.ray.known[job.id] = "SUCCEEDED"
    world.reconciler.round()
    done = world.jobs.get(job.id)
    assert (done.state, done.step) == ("SUCCEEDED", 20) and done.finished_at is not None
    assert world.ray.submitted == [(job.id, 1)]
    assert world.kinds(job) == ["queued", "starting", "running", "succeeded"]


def test_while_ray_is_away_jobs_are_accepted_and_wait(world: World) -> None:
    world.ray.away = True
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    assert world.state(job) == "QUEUED" and world.reconciler.ray_error == "Ray does not answer"
    world.ray.away = False
    world.reconciler.round()
    assert world.state(job) == "STARTING" and world.reconciler.ray_error is None


def test_a_submission_that_fails_is_tried_again_as_the_same_attempt(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.ray.refuse_submit = True
    for _ in range(10):
        world.reconciler.round()
    assert world.state(job) == "STARTING"
    world.ray.refuse_submit = False
    world.reconciler.round()
    assert world.ray.submitted == [(job.id, 1)]


def test_lost_with_its_head_it_runs_again_from_its_checkpoint(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    write_record(world.folder(job), "RUNNING", step=5)
    world.reconciler.round()
    world.ray.known.clear()  # a new head
    world.reconciler.round()
    assert world.ray.submitted == [(job.id, 1)]  # its heartbeat is fresh: it may live
    write_record(world.folder(job), "RUNNING", step=5, age_s=60)
    world.reconciler.round()
    assert world.ray.submitted == [(job.id, 1), (job.id, 2)]


def test_a_heartbeat_that_stands_still_is_none_whatever_the_clock_of_its_node_says(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    write_record(world.folder(job), "RUNNING", age_s=-3600)  # an hour ahead of us
    world.ray.known.clear()
    for _ in range(3):
        world.reconciler.round()
        assert world.state(job) == "RUNNING"
        world.now += 9
    world.reconciler.round()
    assert world.ray.submitted == [(job.id, 1), (job.id, 2)]


def test_a_run_that_comes_back_after_its_job_was_cancelled_finds_that_it_shall_stop(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    write_record(world.folder(job), "RUNNING", age_s=60)  # its disk hangs
    world.ray.known.clear()
    world.jobs.cancel(job.id)
    world.reconciler.round()
    assert world.state(job) == "CANCELLED" and RunFolder(world.folder(job)).stop.exists()


def test_what_an_earlier_attempt_did_is_not_told_as_that_of_a_later_one(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    write_record(world.folder(job), "FAILED", step=3, finished_at=world.now - 1000)
    world.status(job, "FAILED")
    world.reconciler.round()
    assert world.jobs.get(job.id).finished_at == world.now - 1000
    world.jobs.retry(job.id)
    world.reconciler.round()
    world.jobs.cancel(job.id)
    world.status(job, "STOPPED")
    world.reconciler.round()
    cancelled = world.jobs.get(job.id)
    assert (cancelled.state, cancelled.finished_at) == ("CANCELLED", world.now)


def test_a_success_of_an_attempt_that_was_given_up_is_told_in_full(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    write_record(world.folder(job), "RUNNING", step=5, age_s=60)
    world.status(job, "FAILED")
    world.reconciler.round()
    write_record(world.folder(job), "SUCCEEDED", step=20, total_steps=20)
    world.reconciler.round()
    done = world.jobs.get(job.id)
    assert (done.state, done.attempt, done.step, done.total_steps) == ("SUCCEEDED", 2, 20, 20)


def test_it_is_given_up_after_attempts_without_progress_but_not_with(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    for attempt in range(1, 9):  # progress each time
        write_record(world.folder(job), "RUNNING", attempt, step=attempt, age_s=60)
        world.reconciler.round()
        world.status(job, "FAILED")
        world.reconciler.round()
        assert world.state(job) == "STARTING", attempt
    for _ in range(9):
        world.status(job, "FAILED")
        world.reconciler.round()
        world.now += 100
    failed = world.jobs.get(job.id)
    assert failed.state == "FAILED" and failed.reason is not None and "5 times in a row" in failed.reason
    assert failed.attempt == 13


def test_the_last_words_of_a_process_that_died_without_a_log_outlive_ray(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    world.status(job, "FAILED")
    world.ray.refuse_submit = True
    world.reconciler.round()
    log = world.folder(job) / "log.txt"
    told = "attempt 1 ended without giving a reason; what its process printed last:\n    last words of " + job.id
    assert told in log.read_text() and " WARNING service.attempts: " in log.read_text()
    with world.store.session() as session:  # the service died before the row was written: it is not said twice
        row = session.get(Job, job.number)
        assert row is not None
        row.attempt, row.state = 1, "RUNNING"
    world.reconciler.round()
    assert log.read_text().count(told) == 1
    write_record(world.folder(job), "FAILED", 2, reason="why")  # the next one says itself why it ended
    world.ray.refuse_submit = False
    world.status(job, "FAILED")
    world.reconciler.round()
    assert log.read_text().count("ended without giving a reason") == 1


def test_a_ray_that_does_not_tell_them_keeps_no_job_from_its_next_attempt(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    world.status(job, "FAILED")

    def away(*_: Any) -> str:
        raise Unavailable("Ray does not answer")

    world.ray.log_tail = away  # type: ignore[method-assign]
    world.reconciler.round()
    assert world.jobs.get(job.id).attempt == 2 and not (world.folder(job) / "log.txt").exists()


def test_first_come_first_served_within_what_the_cluster_has(world: World) -> None:
    world.ray.cpus = 2
    large = BODY | {"resources": {"cpus_per_worker": 2}}
    jobs = [world.submissions.submit(body)[0] for body in (BODY, large, BODY)]
    world.reconciler.round()
    assert [world.state(job) for job in jobs] == ["STARTING", "QUEUED", "QUEUED"]  # the third may not overtake
    write_record(world.folder(jobs[0]), "SUCCEEDED")
    world.reconciler.round()
    world.reconciler.round()
    assert [world.state(job) for job in jobs] == ["SUCCEEDED", "STARTING", "QUEUED"]


def test_events_of_the_service_and_of_the_run_are_one_list_read_once(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    run = RunFolder(world.folder(job))
    run.event("workers_joined", "rank 1 on node-2")
    write_record(world.folder(job), "RUNNING", step=7)
    world.reconciler.round()
    seen = world.jobs.events(job.id)
    assert [event["kind"] for event in seen] == ["queued", "starting", "workers_joined", "running"]
    assert seen[1]["message"] == "attempt 1" and seen[2]["message"] == "rank 1 on node-2"
    for n in range(len(seen)):
        assert world.jobs.events(job.id, seen[n]["cursor"]) == seen[n + 1 :]
    run.event("preempted", "node-2 goes away")
    with open(run.events, "r+") as file:  # a node whose clock is an hour behind tells late: nothing is lost for that
        text = file.read().replace(f'"time": {run.read_events()[1]["time"]}', '"time": 0')
        file.seek(0)
        file.truncate()
        file.write(text)
    assert [event["kind"] for event in world.jobs.events(job.id, seen[-1]["cursor"])] == ["preempted"]
    world.store.close()
    world.restart()
    assert sorted(world.kinds(job)) == ["preempted", "queued", "running", "starting", "workers_joined"]


def test_a_job_that_came_by_ray_joins_the_list(world: World) -> None:
    folder = world.settings.runs / "raysubmit_1"
    write_record(folder, "RUNNING", step=3, total_steps=9)
    (folder / "job.json").write_text(JobSpec.model_validate(BODY).model_dump_json())
    (world.settings.runs / "not-a-run").mkdir()
    world.ray.known["raysubmit_1"] = "RUNNING"
    world.reconciler.round()
    job = world.jobs.get("raysubmit_1")
    assert (job.origin, job.state, job.step) == ("ray", "RUNNING", 3)
    write_record(folder, "STOPPED")
    world.ray.known["raysubmit_1"] = "STOPPED"
    world.reconciler.round()
    assert world.jobs.get("raysubmit_1").state == "CANCELLED"
    assert world.ray.submitted == []
    assert len(world.jobs.list(limit=10)) == 1


def test_a_folder_that_is_no_run_does_not_stop_the_others(world: World) -> None:
    for name, record, spec in (("a", "{", "{}"), ("b", None, "{}"), ("c", "{}", "{}")):
        folder = world.settings.runs / name
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(spec)
        if record is None:
            write_record(folder, "RUNNING")
        else:
            (folder / "record.json").write_text(record)
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    assert world.state(job) == "STARTING"
    assert [found.id for found in world.jobs.list(limit=10)] == [job.id]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_each_job_ends_in_a_true_state_and_never_runs_twice(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random crashes of the service between any two actions, of Ray, and of runs; then peace, and all is settled."""
    rng = random.Random(seed)
    world = World(tmp_path_factory.mktemp("world"))
    jobs = [world.submissions.submit(BODY)[0] for _ in range(3)]
    ended: dict[str, str] = {}  # what the runs really did
    attempts: dict[str, int] = {}
    cancelled = set()

    def crash_sometimes(*_: object) -> None:
        if rng.random() < 0.1:
            raise Crash

    def live(job: Job) -> bool:
        name = submission_id(job.id, attempts.get(job.id, 0))
        return job.id in attempts and job.id not in ended and world.ray.known.get(name) == "RUNNING"

    for turn in range(60):
        peace = turn >= 40
        world.now = time.time() + 100 * turn * peace  # no waiting for a back-off in peace
        submit = world.ray.submit
        world.ray.refuse_submit = not peace and rng.random() < 0.1
        if not peace:
            sa.event.listen(world.store.engine, "commit", crash_sometimes)
        try:
            world.reconciler.round()
        except Crash:
            sa.event.remove(world.store.engine, "commit", crash_sometimes)
            world.store.close()
            world.restart()
        else:
            if not peace:
                sa.event.remove(world.store.engine, "commit", crash_sometimes)
        assert world.ray.submit == submit
        for job_id, attempt in world.ray.submitted:
            attempts[job_id] = attempt
        for job in jobs:
            if not live(job):
                continue
            folder = world.folder(job)
            stop = RunFolder(folder).stop.exists()
            action = "finish" if peace else rng.choice(["work", "work", "die", "finish", "fail", "forgotten"])
            if stop:
                action = "stop"
            if action == "work":
                write_record(folder, "RUNNING", attempts[job.id], step=turn)
            elif action == "die":
                write_record(folder, "RUNNING", attempts[job.id], step=turn, age_s=60)
                world.ray.known[submission_id(job.id, attempts[job.id])] = "FAILED"
            elif action == "stop":
                write_record(folder, "STOPPED", attempts[job.id], step=turn)
                world.ray.known[submission_id(job.id, attempts[job.id])] = "STOPPED"
            elif action == "forgotten":
                write_record(folder, "RUNNING", attempts[job.id], step=turn, age_s=60)
                del world.ray.known[submission_id(job.id, attempts[job.id])]
            else:
                ended[job.id] = "SUCCEEDED" if action == "finish" else "FAILED"
                write_record(folder, ended[job.id], attempts[job.id], step=turn, reason="why")  # type: ignore[arg-type]
                said: RayStatus = "SUCCEEDED" if action == "finish" else "FAILED"
                world.ray.known[submission_id(job.id, attempts[job.id])] = said
        if not peace and rng.random() < 0.03:
            victim = rng.choice(jobs)
            cancelled.add(victim.id)
            world.jobs.cancel(victim.id)
        for job in jobs:
            wish = world.jobs.resume if peace else rng.choice([world.jobs.pause, world.jobs.resume])
            if peace or rng.random() < 0.05:
                with contextlib.suppress(Conflict):
                    wish(job.id)
    for job in jobs:
        state = world.state(job)
        assert state in TERMINAL
        if job.id in ended:
            assert state == ended[job.id]
        else:
            assert (state == "CANCELLED" and job.id in cancelled) or state == "FAILED"
        told = world.jobs.events(job.id)
        assert told[0]["kind"] == "queued" and told[-1]["kind"] == state.lower()
        attempted = [event["message"] for event in told if event["kind"] == "starting"]
        assert attempted == [f"attempt {n + 1}" for n in range(world.jobs.get(job.id).attempt)]  # none lost or doubled
        kinds = [event["kind"] for event in told]
        assert all(a != b or a == "starting" for a, b in itertools.pairwise(kinds))
    numbers = [(job_id, attempt) for job_id, attempt in world.ray.submitted]
    assert len(set(numbers)) == len(numbers)  # no attempt was started twice
    world.store.close()


def test_a_queue_that_waits_costs_no_statements(world: World) -> None:
    """One read of all rows, however many wait: a round of 10,000 would take as long as 10,000 transactions."""
    world.ray.cpus = 1
    for _ in range(3):
        world.submissions.submit(BODY)
    for _ in range(2):
        world.reconciler.round()  # one starts, two wait; then its new folder is known

    def statements() -> int:
        seen: list[Any] = []

        def note(*arguments: Any) -> None:
            seen.append(arguments)

        sa.event.listen(world.store.engine, "before_cursor_execute", note)
        world.reconciler.round()
        sa.event.remove(world.store.engine, "before_cursor_execute", note)
        return len(seen)

    few = statements()
    for _ in range(20):
        world.submissions.submit(BODY)
    assert statements() == few
