"""What keeps a job waiting, as the reconciler acts and the answer tells: its size, a full head, no room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidSpec
from service.packing import Hardware, Node
from service.seen_nodes import AWAY_S, SeenNodes
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


def test_a_job_for_nodes_that_are_away_waits_for_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of the head, say, the front end in it knows of them by what is in the home."""
    nodes = [{"CPU": 8.0, "GPU": 4.0}] * 3
    monkeypatch.setattr(world.ray, "nodes", lambda: nodes)
    world.reconciler.round()
    nodes = nodes[:1]
    world.reconciler.round()
    world.restart()
    job = submitted(world, workers=8, gpus_per_worker=1)
    world.reconciler.round()
    assert world.state(job) == "QUEUED"
    assert (reason(world, job) or "").startswith(
        "got 8 workers of 1 CPU and 1 GPU, expected at most 4, which this cluster"
    )
    with pytest.raises(InvalidSpec, match="got 16 workers of 1 CPU and 1 GPU, expected at most 12"):
        submitted(world, workers=16, gpus_per_worker=1)
    nodes = nodes * 2
    world.reconciler.round()
    assert world.state(job) == "STARTING"


def test_nodes_that_are_away_for_long_are_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0}] * 3
    monkeypatch.setattr(world.ray, "nodes", lambda: nodes)
    world.reconciler.round()
    written = (world.settings.home / "nodes.json").stat().st_mtime_ns
    nodes = nodes[:1]
    world.now += AWAY_S - 1
    world.reconciler.round()
    submitted(world, workers=8, gpus_per_worker=1)
    assert (world.settings.home / "nodes.json").stat().st_mtime_ns == written
    world.now += 2
    for _ in range(2):  # the first one may not have seen that yet
        with pytest.raises(InvalidSpec, match="expected at most 4, which this cluster holds"):
            submitted(world, workers=8, gpus_per_worker=1)
        world.reconciler.round()


def test_of_a_cluster_that_grows_only_what_may_come_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ray.cpus = 2
    (world.settings.home / "nodes.json").write_text(json.dumps({"at": world.now, "nodes": [{"CPU": 64}] * 3}))
    submitted(world, workers=4)
    monkeypatch.setattr(world.ray, "hardware", lambda: Hardware([Node({"CPU": 2.0})], grows=True))
    with pytest.raises(InvalidSpec, match="expected at most 2"):
        submitted(world, workers=4)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"at": null, "nodes": []}'])
def test_nodes_that_cannot_be_read_are_none(world: World, text: str) -> None:
    (world.settings.home / "nodes.json").write_text(text)
    assert SeenNodes(world.settings.home, world.clock).most() == []
    world.reconciler.round()
    assert len(SeenNodes(world.settings.home, world.clock).most()) == 1


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
