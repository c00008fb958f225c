"""Who is paused for whom: never more than needed, nobody for room that comes by itself, and what is grown counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.packing import Hardware, Node
from service.preemption import giving_way
from service.queue import ordered
from service.store import Job
from service.usage import Cluster
from tests.service.fakes import write_record
from tests.service.test_job_queue import cluster, gpus, ids
from tests.service.world import BODY, World
from workloads.record import RunFolder


class Shown(World):
    """With preemption, and a Ray that shows what is used when a test says so."""

    def submit(self, priority: str, **resources: Any) -> Job:
        body = BODY | {"batch_size": 8, "priority": priority, "resources": {"gpus_per_worker": 1} | resources}
        return self.submissions.submit(body)[0]

    def shows(self, gpus: float) -> None:
        self.ray.used = {"CPU": gpus, "GPU": gpus}

    def runs(self, *jobs: Job) -> None:
        for job in jobs:
            write_record(self.folder(job), "RUNNING", self.jobs.get(job.id).attempt, step=5)

    def rounds(self, n: int = 1) -> None:
        for _ in range(n):
            self.reconciler.round()

    def states(self, *jobs: Job) -> str:
        return " ".join(self.state(job) for job in jobs)


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    world = Shown(tmp_path, preemption=True)
    world.ray.cpus, world.ray.gpus = 64, 4
    yield world
    world.store.close()


def test_nobody_is_paused_for_room_that_a_job_which_starts_has_taken(shown: Shown) -> None:
    """Ray Train is there before its run says so: what Ray shows as used is that job's, not somebody else's."""
    low = shown.submit("low")
    shown.rounds()
    shown.runs(low)
    shown.shows(1)
    shown.rounds()
    first = shown.submit("high")
    shown.rounds()
    shown.shows(2)
    shown.now += 6
    second = shown.submit("high", workers=2)
    shown.rounds(2)
    assert shown.states(low, first, second) == "RUNNING STARTING QUEUED"  # it waits until that is certain
    third = shown.submit("high")
    shown.rounds()
    assert shown.state(low) == "PAUSING"  # for the third, whatever the others hold
    assert f"gives way to {third.id}, whose priority is higher" in [e["message"] for e in shown.jobs.events(low.id)]
    shown.now += 60
    shown.runs(low, first)
    shown.rounds()
    assert shown.state(second) == "STARTING"


def test_nobody_is_paused_for_room_that_ray_gives_back_in_a_moment(shown: Shown) -> None:
    low, ends = shown.submit("low", workers=2), shown.submit("low", workers=2)
    shown.rounds()
    shown.runs(low, ends)
    shown.shows(4)
    shown.rounds()
    high = shown.submit("high")
    write_record(shown.folder(ends), "SUCCEEDED")
    shown.status(ends, "SUCCEEDED")
    shown.rounds(2)
    assert shown.states(low, ends, high) == "RUNNING SUCCEEDED QUEUED"
    shown.now += 2
    shown.rounds()
    assert shown.state(low) == "RUNNING"
    shown.now += 2
    shown.runs(low)
    shown.rounds()
    assert shown.state(low) == "PAUSING"  # something else holds it


def test_one_that_is_paused_is_not_paused_again_for_its_own_room(shown: Shown) -> None:
    """It is in the queue, Ray still shows its GPUs, and the other one is left alone."""
    jobs = [shown.submit("low", workers=2) for _ in range(2)]
    shown.rounds()
    shown.runs(*jobs)
    shown.shows(4)
    shown.rounds()
    high = shown.submit("high", workers=2)
    shown.rounds()
    shown.stopped(jobs[1])
    shown.rounds(3)
    assert shown.states(*jobs, high) == "RUNNING QUEUED QUEUED"
    shown.shows(2)
    shown.rounds(2)
    assert shown.states(*jobs, high) == "RUNNING QUEUED STARTING"


def test_a_process_that_comes_after_its_job_gave_way_is_stopped(shown: Shown) -> None:
    """Ray took the attempt, though its answer was lost; the next attempt is not stopped by that."""
    shown.ray.gpus, shown.ray.refuse_submit = 1, True
    low = shown.submit("low")
    shown.rounds()
    high = shown.submit("high")
    shown.rounds(2)
    assert shown.states(low, high) == "QUEUED QUEUED"
    assert RunFolder(shown.folder(low)).stop.exists()
    shown.ray.refuse_submit = False
    shown.rounds()
    write_record(shown.folder(high), "SUCCEEDED")
    shown.status(high, "SUCCEEDED")
    shown.rounds(2)
    assert shown.states(low, high) == "STARTING SUCCEEDED"
    assert shown.jobs.get(low.id).attempt == 2 and not RunFolder(shown.folder(low)).stop.exists()


def test_what_a_job_has_grown_to_is_given_way_too(shown: Shown) -> None:
    low = shown.submit("low", workers=[1, 4])
    shown.rounds()
    shown.runs(low)
    shown.shows(4)
    shown.rounds()
    high = shown.submit("high", workers=2)
    shown.rounds(2)
    assert shown.states(low, high) == "PAUSING QUEUED"
    shown.stopped(low)
    shown.shows(0)
    shown.rounds(2)
    assert shown.states(high, low) == "STARTING STARTING"  # on what is left: it needs one


def test_a_project_is_charged_for_what_its_job_has_grown_to() -> None:
    elastic = gpus("a0", 1, workers=1, most_workers=8, held={"CPU": 1, "GPU": 1})
    still = gpus("b1", 1, "b", held={"CPU": 1, "GPU": 1})
    hardware = Hardware([Node({"CPU": 32, "GPU": 8}, {"CPU": 7, "GPU": 7})])
    on = Cluster(hardware, {}, [elastic, still])  # what a job needs is looked for before what another has grown to
    assert [on.load(project, on.used[project]) for project in "ab"] == [6 / 8, 1 / 8]
    assert ids(ordered([gpus("a2", 1), gpus("b3", 1, "b")], on)) == "b3 a2"
    assert on.free["GPU"] == 1
    on.remove(elastic)
    assert on.free["GPU"] == 7 and on.load("a", on.used["a"]) == 0


def test_the_fewest_and_the_latest_give_way() -> None:
    running = (gpus("a0", 4, rank=-1), gpus("a1", 2, rank=-1), gpus("b2", 2, "b"), gpus("b3", 8, "b", rank=1))
    on = cluster(cpus=100, gpus=16, running=running)
    urgent = gpus("c9", 2, "c", rank=1)
    assert ids(giving_way(urgent, running, on)) == "a1"
    assert ids(giving_way(gpus("c9", 4, "c", rank=1), running, on)) == "a0"  # a1 is not needed beside it
    assert ids(giving_way(gpus("c9", 8, "c", rank=1), running, on)) == "a1 a0 b2"
    assert giving_way(gpus("c9", 9, "c", rank=1), running, on) == []  # nobody is paused for nothing
    assert giving_way(gpus("c9", 2, "c", rank=-1), running, on) == []
