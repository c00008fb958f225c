"""What people ask of a job that is under way: to cancel it, to pause it, to go on with it."""

from __future__ import annotations

import pytest

from service.errors import Conflict
from tests.service.fakes import write_record
from tests.service.world import BODY, World
from workloads.record import RunFolder
from workloads.spec import JobSpec


def test_cancel_in_every_state(world: World) -> None:
    queued, _ = world.submissions.submit(BODY)
    assert world.jobs.cancel(queued.id).state == "CANCELLED"
    assert world.jobs.cancel(queued.id).state == "CANCELLED"
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    assert [world.jobs.cancel(job.id).state for _ in range(2)] == ["CANCELLING", "CANCELLING"]
    world.reconciler.round()
    assert RunFolder(world.folder(job)).stop.exists() and world.ray.stopped == [job.id]
    write_record(world.folder(job), "STOPPED", step=3)
    world.ray.known[job.id] = "STOPPED"
    world.reconciler.round()
    assert world.state(job) == "CANCELLED" and world.jobs.get(job.id).step == 3
    assert world.jobs.cancel(job.id).state == "CANCELLED"
    assert world.ray.submitted == [(job.id, 1)]


def test_a_pause_frees_the_resources_and_a_resume_goes_on(world: World) -> None:
    world.ray.cpus = 1
    first, second = (world.submissions.submit(BODY)[0] for _ in range(2))
    world.reconciler.round()
    write_record(world.folder(first), "RUNNING", step=5)
    world.reconciler.round()
    assert [world.jobs.pause(first.id).state for _ in range(2)] == ["PAUSING", "PAUSING"]
    world.reconciler.round()
    assert RunFolder(world.folder(first)).stop.exists() and world.ray.stopped == [first.id]
    assert (world.state(first), world.state(second)) == ("PAUSING", "QUEUED")  # it still writes its checkpoint
    world.stopped(first, step=7)
    world.reconciler.round()
    world.reconciler.round()
    paused = world.jobs.get(first.id)
    assert (paused.state, paused.step, paused.finished_at) == ("PAUSED", 7, None)
    assert world.state(second) == "STARTING"
    third, _ = world.submissions.submit(BODY)
    assert [world.jobs.resume(first.id).state for _ in range(2)] == ["QUEUED", "QUEUED"]
    write_record(world.folder(second), "SUCCEEDED")
    world.status(second, "SUCCEEDED")
    world.reconciler.round()
    world.reconciler.round()
    assert (world.state(first), world.state(third)) == ("QUEUED", "STARTING")  # it came back behind the others
    write_record(world.folder(third), "SUCCEEDED")
    world.reconciler.round()
    world.reconciler.round()
    assert world.state(first) == "STARTING" and world.ray.submitted[-1] == (first.id, 2)
    assert not RunFolder(world.folder(first)).stop.exists()
    kinds = ["queued", "starting", "running", "pausing", "paused", "queued", "starting"]
    assert world.kinds(first) == kinds


def test_pauses_are_no_attempts_without_progress(world: World) -> None:
    job, _ = world.submissions.submit(BODY)
    for attempt in range(1, 12):
        world.reconciler.round()
        assert (world.state(job), world.jobs.get(job.id).attempt) == ("STARTING", attempt)
        world.jobs.pause(job.id)
        world.stopped(job)
        world.reconciler.round()
        assert world.state(job) == "PAUSED"
        world.jobs.resume(job.id)
    assert world.jobs.get(job.id).stalled == 0


def test_a_job_is_paused_and_cancelled_wherever_it_is(world: World) -> None:
    queued, _ = world.submissions.submit(BODY)
    assert world.jobs.pause(queued.id).state == "PAUSED"
    world.reconciler.round()
    assert world.state(queued) == "PAUSED" and world.ray.submitted == []
    assert world.jobs.cancel(queued.id).state == "CANCELLED"
    job, _ = world.submissions.submit(BODY)
    world.reconciler.round()
    world.jobs.pause(job.id)
    with pytest.raises(Conflict, match="PAUSING"):
        world.jobs.resume(job.id)
    assert world.jobs.cancel(job.id).state == "CANCELLING"
    with pytest.raises(Conflict, match="CANCELLING"):
        world.jobs.pause(job.id)
    world.stopped(job)
    world.reconciler.round()
    assert world.state(job) == "CANCELLED"
    for request in (world.jobs.pause, world.jobs.resume):
        with pytest.raises(Conflict, match="which is CANCELLED"):
            request(job.id)


def test_a_job_that_reached_max_duration_goes_on_with_a_longer_one_only(world: World) -> None:
    job, _ = world.submissions.submit(BODY | {"max_duration": "1m"})
    world.reconciler.round()
    write_record(world.folder(job), "FAILED", step=5, ran_s=61.0, reason="got max_duration of 60 s")
    world.status(job, "FAILED")
    for _ in range(3):
        world.reconciler.round()
    assert world.state(job) == "FAILED" and len(world.ray.submitted) == 1
    for too_short in (None, 61.0):
        with pytest.raises(Conflict):
            world.jobs.resume(job.id, too_short)
    for _ in range(2):
        resumed = world.jobs.resume(job.id, 120.0)
        assert (resumed.state, resumed.reason, resumed.finished_at) == ("QUEUED", None, None)
    for _ in range(3):
        world.reconciler.round()
    assert world.state(job) == "STARTING" and world.ray.submitted == [(job.id, 1), (job.id, 2)]
    assert JobSpec.model_validate_json((world.folder(job) / "job.json").read_text()).max_duration == 120


def test_another_failure_is_not_resumed(world: World) -> None:
    job, _ = world.submissions.submit(BODY | {"max_duration": 60})
    world.reconciler.round()
    write_record(world.folder(job), "FAILED", ran_s=5.0, reason="the loss became nan")
    world.reconciler.round()
    with pytest.raises(Conflict, match="which is FAILED"):
        world.jobs.resume(job.id, 120.0)
