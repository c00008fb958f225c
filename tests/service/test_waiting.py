"""What keeps a job waiting, as the reconciler acts and the answer tells: its size, a full head, no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.store import Job
from tests.service.fakes import write_record
from tests.service.world import BODY, World
from workloads.spec import JobSpec


def submitted(world: World, **resources: Any) -> Job:
    return world.submissions.submit(BODY | {"batch_size": 64, "resources": resources})[0]


def reason(world: World, job: Job) -> str | None:
    world.now += 3  # another reading of the queue
    queue = world.jobs.view(world.jobs.get(job.id))["queue"]
    return None if queue is None else queue["reason"]


def test_a_job_that_came_while_ray_was_away_and_fits_nowhere_is_passed(world: World) -> None:
    world.ray.cpus, world.ray.gpus = 64, 8
    world.ray.away = True
    large = submitted(world, workers=64, gpus_per_worker=1)
    assert reason(world, large) == "Ray does not answer"
    world.ray.away = False
    small = submitted(world, workers=8, gpus_per_worker=1)
    world.reconciler.round()
    assert (world.state(large), world.state(small)) == ("QUEUED", "STARTING")
    assert reason(world, large) == (
        "got 64 workers of 1 CPU and 1 GPU, expected at most 8, which this cluster holds, so others pass it until that "
        "changes; resources.workers: 8 fits"
    )
    write_record(world.folder(small), "SUCCEEDED")
    world.ray.gpus = 64  # it grew back
    world.reconciler.round()
    world.reconciler.round()
    assert world.state(large) == "STARTING"


def test_nobody_gives_way_for_a_job_that_fits_nowhere_but_for_the_next(tmp_path: Path) -> None:
    world = World(tmp_path, preemption=True)
    world.ray.cpus = 64
    low = world.submissions.submit(BODY | {"priority": "low", "resources": {"cpus_per_worker": 8}})[0]
    world.reconciler.round()
    high = BODY | {"priority": "high"}
    world.submissions.submit(high | {"resources": {"cpus_per_worker": 64}})
    world.ray.cpus = 8
    world.reconciler.round()
    assert world.state(low) == "STARTING"
    world.submissions.submit(high)
    world.reconciler.round()
    assert world.state(low) == "PAUSING"
    world.store.close()


def test_a_full_head_is_told(world: World) -> None:
    world.ray.cpus, world.ray.gpus, world.ray.drivers = 64, 64, 2
    jobs = [submitted(world, gpus_per_worker=1) for _ in range(3)]
    world.reconciler.round()
    assert [world.state(job) for job in jobs] == ["STARTING", "STARTING", "QUEUED"]
    assert reason(world, jobs[2]) == "the head holds the drivers of 2 jobs at a time (max_running_jobs)"
    write_record(world.folder(jobs[0]), "SUCCEEDED")
    world.reconciler.round()
    world.reconciler.round()
    assert world.state(jobs[2]) == "STARTING"


@pytest.mark.parametrize(("known", "state"), [(False, "STARTING"), (True, "QUEUED")])
def test_a_job_on_a_cluster_of_its_own_takes_nothing_of_this_one(world: World, known: bool, state: str) -> None:
    """The folder of a run that this Ray does not know is that of `manta submit --k8s`, or of a run by hand."""
    world.ray.cpus, world.ray.gpus = 64, 8
    folder = world.settings.runs / "job-k8s"
    write_record(folder, "RUNNING")
    spec = JobSpec.model_validate(BODY | {"batch_size": 64, "resources": {"workers": 8, "gpus_per_worker": 1}})
    (folder / "job.json").write_text(spec.model_dump_json())
    if known:
        world.ray.known["job-k8s"] = "RUNNING"
    job = submitted(world, workers=8, gpus_per_worker=1)
    world.reconciler.round()
    assert world.jobs.get("job-k8s").origin == ("ray" if known else "outside")
    assert world.state(job) == state
    assert reason(world, job) == (None if state == "STARTING" else "needs 8 GPU (0 free)")
