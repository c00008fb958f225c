"""The order of the queue, quotas and preemption, over made-up clusters."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from copy import deepcopy

from hypothesis import given
from hypothesis import strategies as st

from service.packing import Hardware, Node
from service.queue import admitted, ordered, starts
from service.usage import Cluster, Entry, Quota

PROJECTS = ("a", "b", "c")


def entry(name: str, project: str = "a", cpus: float = 1, **more: object) -> Entry:
    """A job of one CPU; the digits of its name are its place."""
    place = (0.0, int("".join(filter(str.isdigit, name)) or 0))
    usual = {"id": name, "project": project, "rank": 0, "place": place, "needs": {"CPU": cpus}, "most_gpus": 0}
    return Entry(**(usual | more))  # type: ignore[arg-type]


def gpus(name: str, n: float, project: str = "a", **more: object) -> Entry:
    return entry(name, project, needs={"CPU": 1, "GPU": n}, most_gpus=n, **more)


def cluster(cpus: float = 4, gpus: float = 0, running: tuple[Entry, ...] = (), **quotas: Quota) -> Cluster:
    return Cluster(Hardware([Node({"CPU": cpus, "GPU": gpus})]), quotas, running)


def ids(entries: list[Entry]) -> str:
    return " ".join(one.id for one in entries)


def starting(queue: list[Entry], on: Cluster) -> str:
    return ids([one for one, wait in admitted(queue, on) if wait is None])


def test_priority_then_share_then_arrival() -> None:
    waiting = [entry(f"a{i}") for i in range(3)] + [entry(f"b{i}", "b") for i in range(3, 5)]
    assert ids(ordered(waiting, cluster())) == "a0 b3 a1 b4 a2"
    assert ids(ordered([*waiting, entry("a9", rank=1)], cluster())) == "a9 b3 a0 b4 a1 a2"
    assert ids(ordered([*waiting, entry("c8", "c", rank=-1)], cluster())).endswith("c8")
    assert ids(ordered(waiting, cluster(running=(entry("a7"), entry("a8"))))) == "b3 b4 a0 a1 a2"


def test_a_share_is_a_weight_and_the_scarcest_resource_counts() -> None:
    waiting = [entry(f"a{i}") for i in range(6)] + [entry(f"b{i}", "b") for i in range(6, 12)]
    order = ordered(waiting, cluster(cpus=12, b=Quota(share=2.0)))
    assert Counter(one.project for one in order[:6]) == {"a": 2, "b": 4}
    on = cluster(cpus=100, gpus=4, running=(gpus("a0", 2), entry("b1", "b", cpus=40)))  # half of the GPUs; 40 % of CPUs
    assert ids(ordered([entry("a2"), entry("b3", "b")], on)) == "b3 a2"


def test_a_job_without_room_keeps_what_there_is_and_no_more() -> None:
    queue = [gpus("a0", 8), gpus("a1", 2), entry("a2")]
    running = (gpus("b9", 2),)
    assert starting(queue, cluster(4, 8, running)) == "a2"  # a1 would take GPUs that a0 waits for; a2 asks for none
    waits = {one.id: wait for one, wait in admitted(queue[:2], cluster(4, 8, running)) if wait}
    assert waits["a0"].reason == "needs 8 GPU (6 free)" and waits["a0"].kind == "room"
    assert waits["a1"].reason == "needs 2 GPU (0 free)"
    assert starting([entry("a0", cpus=6), entry("a1")], cluster(6, running=(entry("b9", cpus=2),))) == ""


def test_a_quota_holds_back_its_own_project_only() -> None:
    queue = [entry("a0"), entry("a1"), entry("b2", "b")]
    on = cluster(a=Quota(running=1))
    waits = {one.id: wait for one, wait in admitted(queue, on)}
    assert waits["a0"] is None and waits["b2"] is None
    assert waits["a1"] is not None and waits["a1"] == ("project a runs 1 jobs, as many as it may", "quota")
    elastic = entry("a1", needs={"CPU": 1, "GPU": 1}, most_gpus=4)  # may grow beyond
    on = cluster(gpus=8, running=(gpus("a0", 1),), a=Quota(gpus=4))
    ((_, wait),) = admitted([elastic], on)
    assert wait is not None and wait.reason == "project a has 1 of the 4 GPUs that it may have"


def test_a_large_job_is_not_overtaken_in_its_quota() -> None:
    queue = [gpus("a0", 4), gpus("a1", 1), entry("a2"), gpus("b3", 1, "b")]
    on = cluster(cpus=9, gpus=8, running=(gpus("a9", 2),), a=Quota(gpus=4))
    assert starting(queue, on) == "a2 b3"


def test_a_job_that_could_never_start_takes_no_turn_of_its_project() -> None:
    waiting = [gpus("a0", 8), entry("a1"), *(entry(f"b{i}", "b") for i in range(2, 5))]
    assert ids(ordered(waiting, cluster(cpus=2, gpus=4))) == "a1 b2 b3 b4 a0"
    lowered = cluster(cpus=2, gpus=8, a=Quota(gpus=4))
    assert ids(ordered([gpus("a0", 8, rank=1), *waiting[1:]], lowered)) == "a1 b2 b3 b4 a0"


def test_what_a_quota_of_gpus_holds_back_takes_no_turn_of_its_project() -> None:
    """They take turns with those of others, but behind what their project may start."""
    waiting = [gpus(f"a{i}", 1) for i in range(6)] + [entry("a6"), *(entry(f"b{i}", "b") for i in range(7, 11))]
    on = cluster(cpus=5, gpus=8, running=(gpus("a98", 1), entry("b99", "b")), a=Quota(gpus=2))
    queue = ordered(waiting, on)
    assert ids(queue) == "a0 b7 a6 b8 a1 b9 a2 b10 a3 a4 a5"
    assert starting(queue, on) == "a0 b7 a6"


FLOATS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 8.0])
JOBS = st.lists(
    st.builds(
        lambda i, project, rank, cpus, some: entry(
            f"j{i}",
            project,
            rank=rank,
            needs={"CPU": cpus} | ({"GPU": some} if some else {}),
            most_gpus=some,
            seconds=float(i % 7),
        ),
        st.integers(0, 10**6),
        st.sampled_from(PROJECTS),
        st.integers(-1, 1),
        st.integers(1, 4),
        FLOATS,
    ),
    max_size=30,
    unique_by=lambda one: one.id,
)
QUOTAS = st.dictionaries(
    st.sampled_from(PROJECTS),
    st.builds(
        Quota,
        st.none() | st.sampled_from([0.0, 1.0, 8.0]),
        st.none() | st.integers(0, 5),
        st.sampled_from([0.5, 1.0, 3.0]),
    ),
)


@given(JOBS, QUOTAS, st.integers(1, 16), FLOATS)
def test_whoever_waits(waiting: list[Entry], quotas: dict[str, Quota], cpus: int, some: float) -> None:
    """All are in the queue once, priorities and arrivals are kept, and what starts fits beside what runs.

    Behind are those that will never start; one that asks for no GPU may pass those that a quota of GPUs holds back.
    """
    on = Cluster(Hardware([Node({"CPU": cpus, "GPU": some})]), quotas, waiting[:2])
    queue = ordered(waiting[2:], on)
    assert sorted(one.id for one in queue) == sorted(one.id for one in waiting[2:])
    waits = {one.id: wait for one, wait in admitted(queue, deepcopy(on))}
    never = [one for one in queue if (wait := waits[one.id]) and wait.kind == "misfit"]
    assert queue[len(queue) - len(never) :] == never
    ours = queue[: len(queue) - len(never)]
    assert all(one.rank >= other.rank for one, other in itertools.pairwise(ours))
    for lane in itertools.product(PROJECTS, (-1, 0, 1), (False, True)):
        places = [one.place for one in ours if (one.project, one.rank, one.most_gpus > 0) == lane]
        assert places == sorted(places)
    before = on.free
    started = [one for one, wait in admitted(queue, on) if wait is None]
    assert sum(one.needs["CPU"] for one in started) <= max(before["CPU"], 0) + 1e-6
    assert sum(one.needs.get("GPU", 0) for one in started) <= max(before["GPU"], 0) + 1e-6
    for project, quota in quotas.items():
        mine = [one for one in started if one.project == project]
        if quota.gpus is not None and any(one.most_gpus for one in mine):
            assert on.used[project].most_gpus <= quota.gpus + 1e-6
        if quota.running is not None and mine:
            assert on.used[project].running <= quota.running
    if queue and not quotas and all(need <= before[name] for name, need in queue[0].needs.items()):
        assert started[0] == queue[0]


@given(JOBS, st.integers(4, 16))
def test_who_fits_an_empty_cluster_starts_at_last(waiting: list[Entry], cpus: int) -> None:
    queue = ordered(waiting, cluster(cpus=cpus, gpus=8))
    found = starts(queue, [], cluster(cpus=cpus, gpus=8))
    assert set(found) == {one.id for one in waiting}
    assert not queue or found[queue[0].id] == 0.0


def test_expected_starts_end_where_nobody_knows_how_long_a_job_takes() -> None:
    running = [entry("r0", cpus=2, seconds=100.0), entry("r1", cpus=2, seconds=30.0)]
    queue = [entry("a2", cpus=2, seconds=50.0), entry("a3", cpus=2, seconds=math.inf), entry("a4", cpus=4), entry("a5")]
    on = cluster(running=tuple(running))
    assert starts(queue, running, on) == {"a2": 30.0, "a3": 80.0}


def test_projects_take_turns_in_a_long_queue() -> None:
    waiting = [entry(f"j{i}", f"p{i % 100}") for i in range(10_000)]
    assert [one.place[1] for one in ordered(waiting, cluster(cpus=1000))] == list(range(10_000))
