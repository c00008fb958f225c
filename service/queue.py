"""Who runs next: priorities, fair shares and quotas of projects. Pure: a cluster and a clock can be made up.

Of the jobs that wait the one goes first whose priority is highest; among those one of the project that uses least of
the cluster for its share (of CPUs, GPUs or others, whichever is most: dominant resource fairness, NSDI 2011); among
those the one that came first. A job for which there is no room keeps what there is of it, so that nobody behind it can
take that away; one that its project's quota holds back keeps its part of the quota, and nothing of the cluster. One
that would not fit if the cluster were empty keeps nothing of either: nothing that ends makes room for it. What is kept
back so is not counted as used by the project either: its other jobs take their turns as if it were not there.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Literal, NamedTuple

from service.packing import EPS, Rooms
from service.usage import Cluster, Entry, Shape, Use

Priority = Literal["low", "normal", "high"]
RANKS: dict[Priority, int] = {"low": -1, "normal": 0, "high": 1}


class Wait(NamedTuple):
    """Why an entry does not start.

    `misfit`: no cluster or quota of this size will ever hold it; `quota`: that of its project is used; `head`: which
    holds no more drivers; `room`: there is none on the nodes.
    """

    reason: str
    kind: Literal["misfit", "quota", "head", "room"]


def ordered(waiting: Iterable[Entry], cluster: Cluster) -> list[Entry]:
    """Those that wait, in the order in which they will run; behind them those that will not."""
    lanes, misfits = defaultdict[tuple[str, bool], deque[Entry]](deque), list[Entry]()
    uses, all_gpus = dict[tuple[str, bool], Use](), defaultdict[str, float](float)
    for entry in sorted(waiting, key=lambda entry: (-entry.rank, entry.place)):
        if _misfit(entry, cluster):
            misfits.append(entry)
            continue
        project, quota = entry.project, cluster.quota(entry.project).gpus
        all_gpus[project] += entry.most_gpus
        has = cluster.used[project].most_gpus
        beyond = quota is not None and entry.most_gpus > 0 and has + all_gpus[project] > quota + EPS
        lanes[project, beyond].append(entry)
    for project, beyond in lanes:
        uses[project, beyond] = deepcopy(cluster.used[project])
        for entry in lanes.get((project, False), ()) if beyond else ():
            uses[project, beyond].add(entry)  # those come after all that its quota does not hold back

    def turn(lane: tuple[str, bool]) -> tuple[float, float, tuple[float, int], tuple[str, bool]]:
        first = lanes[lane][0]
        return -first.rank, cluster.load(lane[0], uses[lane]), first.place, lane

    heap = [turn(lane) for lane in lanes]
    heapq.heapify(heap)
    found = []
    while heap:
        lane = heap[0][-1]
        entry = lanes[lane].popleft()
        found.append(entry)
        uses[lane].add(entry)
        if lanes[lane]:
            heapq.heapreplace(heap, turn(lane))
        else:
            heapq.heappop(heap)
    return found + misfits


def admitted(queue: Iterable[Entry], cluster: Cluster) -> Iterator[tuple[Entry, Wait | None]]:
    """Each entry, in its order, and why it does not start now; None where it does, and is on the cluster from then on.

    Args:
        queue: by `ordered`.
        cluster: changed as entries start.
    """
    rooms, drivers = Rooms(cluster.rooms.nodes), cluster.drivers  # without what those that wait keep
    promised = Counter[str]()  # GPUs of the quotas of projects, to those that wait for them
    without = dict[Shape, Wait]()  # room: rooms only shrink, so the next one of a shape need not look
    for entry in queue:
        use, quota = cluster.used[entry.project], cluster.quota(entry.project)
        if said := _misfit(entry, cluster):
            yield entry, Wait(said, "misfit")
            continue
        if quota.running is not None and use.running >= quota.running:
            yield entry, Wait(f"project {entry.project} runs {use.running} jobs, as many as it may", "quota")
            continue
        most = use.most_gpus + promised[entry.project] + entry.most_gpus
        if quota.gpus is not None and entry.most_gpus and most > quota.gpus + EPS:
            promised[entry.project] += entry.most_gpus  # type: ignore[assignment]  # typeshed counts by int
            said = f"project {entry.project} has {use.most_gpus:g} of the {quota.gpus:g} GPUs that it may have"
            yield entry, Wait(said, "quota")
            continue
        if entry.on_head and cluster.head_is_full(drivers):
            said = f"the head holds the drivers of {cluster.hardware.drivers} jobs at a time (max_running_jobs)"
            yield entry, Wait(said, "head")
            continue
        if (wait := without.get(entry.shape)) is None:
            drivers += entry.on_head
            here = rooms.take(entry.each, entry.workers)
            if sum(here.values()) == entry.workers:
                cluster.put(entry, here)
                yield entry, None
                continue
            wait = without[entry.shape] = Wait(_lacks(entry, sum(here.values()), rooms), "room")
            cluster.owe(entry, rooms, here)
        yield entry, wait


def starts(queue: Sequence[Entry], running: Iterable[Entry], cluster: Cluster) -> dict[str, float]:
    """Seconds until each starts, as far as that can be told: those behind a job of unknown length are left out.

    The queue is played through by `admitted`: whenever a job ends, those start that may.

    Args:
        queue: by `ordered`.
        running: with the seconds that they go on.
        cluster: with those on it; changed.
    """
    ends = [(entry.seconds, entry.id, entry) for entry in running]
    heapq.heapify(ends)
    now, found, waiting = 0.0, dict[str, float](), list(queue)
    while waiting and now < math.inf:
        still = []
        for entry, why in admitted(waiting, cluster):
            if why is not None:
                still.append(entry)
                continue
            found[entry.id] = now
            heapq.heappush(ends, (now + entry.seconds, entry.id, entry))
        waiting = still
        if not ends:
            break
        now, _, ended = heapq.heappop(ends)
        cluster.remove(ended)
    return found


def _misfit(entry: Entry, cluster: Cluster) -> str | None:
    """Why it could not start if nothing ran."""
    if not cluster.holds(entry):
        return f"needs {_listed(entry)}, for which there would be no room if nothing ran here"
    most = cluster.quota(entry.project).gpus
    if most is not None and entry.most_gpus > most + EPS:
        return f"may have {entry.most_gpus:g} GPUs, project {entry.project} no more than {most:g}"
    return None


def _lacks(entry: Entry, fit: int, rooms: Rooms) -> str:
    """What there is too little of, all together or node by node; `rooms` are without the workers that fit."""
    free = rooms.free(entry.needs)
    has = {name: free[name] + fit * need for name, need in entry.each.items()}
    short = [f"{need:g} {name} ({has[name]:g} free)" for name, need in entry.needs.items() if need > has[name] + EPS]
    return f"needs {' and '.join(short) or f'{_listed(entry)} (the nodes have room for {fit})'}"


def _listed(entry: Entry) -> str:
    each = " and ".join(f"{need:g} {name}" for name, need in entry.each.items())
    return f"{entry.workers} workers of {each}" if entry.workers > 1 else each
