"""Room node by node, what is held by no job, jobs that can never start, and the drivers on the head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.packing import Hardware, Node, workers_on
from service.preemption import giving_way
from service.queue import admitted, ordered, starts
from service.usage import Cluster, Entry, Quota


def entry(number: int, workers: int = 1, gpus: float = 0, **more: Any) -> Entry:
    """Of workers of `cpus` CPUs and so many GPUs each; running ones are seen by Ray."""
    each = {"CPU": more.pop("cpus", 1.0)} | ({"GPU": gpus} if gpus else {})
    needs = {name: workers * need for name, need in each.items()}
    usual: dict[str, Any] = {"id": f"j{number}", "project": "a", "rank": 0, "place": (0.0, number)}
    usual |= {"most_gpus": workers * gpus}
    return Entry(**(usual | {"needs": needs, "workers": workers, "held": each} | more))


def nodes(*used: float, cpus: float = 16) -> list[Node]:
    """So many CPUs used of each; 8 GPUs, of which none is."""
    return [Node({"CPU": cpus, "GPU": 8.0}, {"CPU": some}) for some in used]


def waits(queue: list[Entry], cluster: Cluster) -> list[str | None]:
    return [wait and wait.kind for _, wait in admitted(queue, cluster)]


def job(**columns: Any) -> SimpleNamespace:
    """A row that runs."""
    usual: dict[str, Any] = {"id": "k", "project": "a", "rank": 0, "number": 1, "state": "RUNNING", "origin": "rest"}
    usual |= {"resumed_at": None, "created_at": 0.0, "submitted_at": 1.0, "cpus": 1.0, "gpus": 0.0, "most_gpus": 0.0}
    return SimpleNamespace(**(usual | {"custom": {}, "workers": 1} | columns))


def test_a_worker_has_room_on_one_node_or_none() -> None:
    cluster = Cluster(Hardware(nodes(10, 10)), {})  # by served models: no job runs
    assert cluster.free["CPU"] == 12
    ((_, wait),) = admitted([entry(1, cpus=12)], cluster)
    assert wait is not None and wait.reason == "needs 12 CPU (the nodes have room for 0)"
    ((_, wait),) = admitted([entry(1, workers=3, cpus=4)], cluster)
    assert wait is not None and wait.reason == "needs 3 workers of 4 CPU (the nodes have room for 2)"
    assert waits([entry(1, workers=2, cpus=6)], cluster) == [None]


def test_what_is_used_is_that_of_the_jobs_first() -> None:
    running = [entry(1, workers=2, cpus=4)]
    assert Cluster(Hardware(nodes(8, 0)), {}, running).free["CPU"] == 24  # both workers are on the first node
    assert Cluster(Hardware(nodes(9, 2)), {}, running).free["CPU"] == 21  # and three CPUs are no job's
    coming = entry(1, workers=2, cpus=4, held={})  # it starts: what is used is not yet by it
    assert Cluster(Hardware(nodes(1, 0)), {}, [coming]).free["CPU"] == 23
    half = Cluster(Hardware(nodes(4, 0)), {}, running)  # one worker is lost, and will come back
    assert half.free["CPU"] == 24


def test_a_job_keeps_the_node_that_is_nearest_to_having_room() -> None:
    running = [entry(1, gpus=5), entry(2, gpus=3)]
    hardware = Hardware([Node({"CPU": 16, "GPU": 8.0}, {"CPU": 1, "GPU": used}) for used in (5.0, 3.0)])
    found = list(admitted([entry(3, gpus=8), entry(4, gpus=4)], Cluster(hardware, {}, running)))
    assert [wait and wait.reason for _, wait in found] == [
        "needs 1 CPU and 8 GPU (the nodes have room for 0)",
        "needs 4 GPU (3 free)",  # the five of the second node are kept
    ]
    assert waits([entry(3, gpus=8), entry(5, gpus=3)], Cluster(hardware, {}, running)) == ["room", None]


def test_a_job_that_can_never_start_is_passed() -> None:
    queue = [entry(1, workers=64, gpus=1), entry(2, gpus=4), entry(3, workers=2, gpus=4)]
    cluster = Cluster(Hardware(nodes(0)), {})
    assert waits(queue, cluster) == ["misfit", None, "room"]
    quota = {"a": Quota(gpus=4)}  # lowered since
    assert waits([entry(1, gpus=8), entry(2, gpus=4)], Cluster(Hardware(nodes(0)), quota)) == ["misfit", None]
    assert starts(queue[:2], [], Cluster(Hardware(nodes(0)), {})) == {"j2": 0.0}


def test_the_head_holds_so_many_drivers() -> None:
    hardware = Hardware(nodes(0, 0, 0, 0), drivers=2)
    queue = [entry(1, gpus=1), entry(2, gpus=1), entry(3, gpus=1), entry(4, on_head=False)]
    found = list(admitted(queue, Cluster(hardware, {})))
    assert [wait and wait.kind for _, wait in found] == [None, None, "head", None]
    assert found[2][1] is not None
    assert found[2][1].reason == "the head holds the drivers of 2 jobs at a time (max_running_jobs)"
    large = [entry(1, gpus=1, seconds=9.0), entry(2, workers=4, gpus=8), entry(3, gpus=1)]
    assert waits(large, Cluster(hardware, {})) == [None, "room", "head"]  # the second place is that of j2
    low = entry(9, rank=-1, gpus=1)
    full = Cluster(Hardware(nodes(0), drivers=1), {}, [low])
    assert giving_way(entry(1, gpus=1), [low], full) == [low]


def test_on_its_own_cluster_a_job_holds_its_quota_and_nothing_here() -> None:
    row = job(cpus=8.0, gpus=8.0, most_gpus=8.0, workers=8, origin="outside", submitted_at=None)
    hardware = Hardware(nodes(0), drivers=1)
    cluster = Cluster(hardware, {"a": Quota(gpus=12)}, [Entry.of(row, hardware, 0.0)])
    assert cluster.free == {"CPU": 16, "GPU": 8} and cluster.drivers == 0
    assert waits([entry(2, gpus=8), entry(3, gpus=4)], cluster) == ["quota", "quota"]
    assert waits([entry(2, gpus=4)], cluster) == [None]
    row.submitted_at = 9.0  # it was resumed here
    assert Cluster(hardware, {}, [Entry.of(row, hardware, 0.0)]).free == {"CPU": 8, "GPU": 0}


@pytest.mark.parametrize(
    ("grows", "asked", "held", "on_head"),
    [
        (False, 1, {}, True),  # the driver trains, on the head
        (True, 1, {"CPU": 4.0}, False),
        (False, [1, 2], {"CPU": 4.0}, True),
        (True, 2, {"CPU": 2.0}, True),
        (True, None, {"CPU": 4.0}, False),
    ],
)
def test_where_the_driver_is(grows: bool, asked: Any, held: dict[str, float], on_head: bool) -> None:
    found = Entry.of(job(cpus=4.0, workers=asked), Hardware([], grows=grows), 100.0)
    assert (found.held, found.on_head) == (held, on_head)


@pytest.mark.parametrize(("age_s", "held"), [(5.0, {}), (60.0, {"CPU": 2.0})])
def test_a_job_that_starts_is_not_seen_at_once(age_s: float, held: dict[str, float]) -> None:
    starting = job(state="STARTING", cpus=4.0, workers=2, submitted_at=100.0)
    assert Entry.of(starting, Hardware([]), 100.0 + age_s).held == held


SIZES = st.sampled_from([1.0, 2.0, 3.0, 5.0])
QUEUES = st.lists(st.tuples(st.integers(1, 4), SIZES, st.sampled_from([0.0, 0.5, 1.0, 4.0])), max_size=12)
NODES = st.lists(
    st.builds(
        lambda cpus, gpus, some: Node({"CPU": cpus, "GPU": gpus}, {"CPU": min(some, cpus)}),
        st.sampled_from([2.0, 4.0, 8.0]),
        st.sampled_from([0.0, 2.0, 8.0]),
        st.sampled_from([0.0, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=5,
)


@given(QUEUES, NODES)
def test_what_starts_has_room_node_by_node(asked: list[tuple[int, float, float]], found: list[Node]) -> None:
    """No node is promised beyond its size, whoever waits lacks a place, and the first that could ever start is next."""
    queue = [entry(i, workers, gpus, cpus=cpus) for i, (workers, cpus, gpus) in enumerate(asked)]
    cluster = Cluster(Hardware(found), {})
    queue = ordered(queue, cluster)
    verdicts = list(admitted(queue, cluster))
    assert all(amount >= -1e-6 for room in cluster.rooms.nodes for amount in room.values())
    for one, wait in verdicts:
        fits = sum(workers_on(node.total, one.each) for node in found) >= one.workers
        assert (wait is not None and wait.kind == "misfit") == (not fits)
    empty = [Node(node.total) for node in found]
    possible = [one.id for one, wait in verdicts if wait is None or wait.kind != "misfit"]
    told = starts(queue, [], Cluster(Hardware(empty), {}))
    assert not told.keys() - set(possible)
    assert not possible or told[possible[0]] == 0.0


@given(QUEUES, NODES)
def test_a_large_job_is_never_starved(asked: list[tuple[int, float, float]], found: list[Node]) -> None:
    """With jobs that end one by one, each that could ever start does, though smaller ones stand behind it."""
    empty = Hardware([Node(node.total) for node in found])
    queue = [entry(i, workers, gpus, cpus=cpus, seconds=1.0 + i % 3) for i, (workers, cpus, gpus) in enumerate(asked)]
    cluster = Cluster(empty, {})
    told = starts(ordered(queue, cluster), [], cluster)
    assert told.keys() == {one.id for one in queue if cluster.holds(one)}
