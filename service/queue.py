"""Who runs next: priorities, fair shares and quotas of projects. Pure: a cluster and a clock can be made up.

Of the jobs that wait the one goes first whose priority is highest; among those one of the project that uses least of
the cluster for its share (of CPUs, GPUs or others, whichever is most: dominant resource fairness, NSDI 2011); among
those the one that came first. A job for which there is no room keeps what there is of it, so that nobody behind it can
take that away; one that its project's quota holds back keeps its part of the quota, and nothing of the cluster. One
that would not fit if the cluster were empty keeps nothing of either: nothing that ends makes room for it.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from service.packing import EPS, Hardware, Places, Rooms, of_driver, workers_on

Priority = Literal["low", "normal", "high"]
RANKS: dict[Priority, int] = {"low": -1, "normal": 0, "high": 1}

ARRIVES_S = 30.0  # a job for which there is room holds it by then: a group of Ray Train is there after about 20 s

Shape = tuple[int, tuple[tuple[str, float], ...]]


class Wait(NamedTuple):
    """Why an entry does not start.

    `misfit`: no cluster or quota of this size will ever hold it; `quota`: that of its project is used; `head`: which
    holds no more drivers; `room`: there is none on the nodes.
    """

    reason: str
    kind: Literal["misfit", "quota", "head", "room"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What the queue knows of a job.

    Attributes:
        id: of the job.
        project: whose it is.
        rank: of its priority; more is sooner.
        place: when it came, and its number.
        needs: to start, by the names of Ray; {}: it runs on a cluster of its own.
        most_gpus: that it may grow to; what quotas count.
        seconds: how long it will run, or goes on running; inf: nobody knows.
        workers: that share `needs` evenly; each is on one node.
        held: what Ray shows as used for each of them, of a job that runs.
        on_head: its driver runs there.
    """

    id: str
    project: str
    rank: int
    place: tuple[float, int]
    needs: Mapping[str, float]
    most_gpus: float
    seconds: float = math.inf
    workers: int = 1
    held: Mapping[str, float] = field(default_factory=dict)
    on_head: bool = True

    @classmethod
    def of(cls, job: Any, hardware: Hardware, now: float, seconds: float = math.inf) -> Entry:
        """Of a `store.Job`, or a row with its columns and `resources` of its spec; `now` is since the epoch."""
        place = job.resumed_at or job.created_at, job.number
        needs = {name: need for name, need in {"CPU": job.cpus, "GPU": job.gpus, **job.custom}.items() if need}
        most_gpus = max(job.most_gpus, job.gpus)  # an older front end knows none of the first
        if job.origin == "outside" and job.submitted_at is None:  # and was never resumed here
            return cls(job.id, job.project, job.rank, place, {}, most_gpus, seconds, 0, {}, on_head=False)
        asked = (job.resources or {}).get("workers", 1)
        least, most = asked if isinstance(asked, list) else (asked, asked)
        driver = of_driver(needs, most, grows=hardware.grows)
        trains_alone = most == 1 and not job.gpus
        held = driver if trains_alone else {name: need / least for name, need in needs.items()}
        if job.state == "STARTING" and now - (job.submitted_at or 0.0) < ARRIVES_S:
            held = {}  # Ray may not have come to it
        return cls(job.id, job.project, job.rank, place, needs, most_gpus, seconds, least, held, on_head=not driver)

    @property
    def each(self) -> dict[str, float]:
        """Needs of a worker."""
        return {name: need / self.workers for name, need in self.needs.items()}

    @property
    def shape(self) -> Shape:
        """Equal of entries for which there is room on the same nodes."""
        return self.workers, tuple(self.needs.items())


@dataclass(frozen=True)
class Quota:
    """Of a project; None: no limit.

    Attributes:
        gpus: that its running jobs may have together.
        running: jobs at a time.
        share: of the cluster, beside those of others.
    """

    gpus: float | None = None
    running: int | None = None
    share: float = 1.0


@dataclass
class Use:
    """What the running jobs of a project have."""

    has: Counter[str] = field(default_factory=Counter)
    most_gpus: float = 0.0
    running: int = 0

    def add(self, entry: Entry, sign: int = 1) -> None:
        for name, need in entry.needs.items():
            self.has[name] += sign * need  # type: ignore[assignment]  # typeshed counts by int
        self.most_gpus += sign * entry.most_gpus
        self.running += sign


class Cluster:
    """What there is, and who uses what of it.

    Attributes:
        hardware: what there is, or may be.
        used: by project.
        rooms: what is free.
        drivers: on the head.
    """

    def __init__(self, hardware: Hardware, quotas: Mapping[str, Quota], entries: Iterable[Entry] = ()) -> None:
        """The cluster with these on it.

        What Ray shows as used is taken to be theirs so far as it can be; the rest is no job's room: that of a served
        model, or of what an elastic job has beyond its least. Whoever is not seen there has still to come.

        Args:
            hardware: what there is, or may be.
            quotas: of projects that have one.
            entries: that run.
        """
        self.hardware, self._quotas = hardware, quotas
        self._sizes = [node.total for node in hardware.nodes]
        self._total = Counter[str]()
        for size in self._sizes:
            self._total.update(size)
        self._held: dict[Shape, bool] = {}
        self._places: dict[str, list[Places]] = {}
        self.used: defaultdict[str, Use] = defaultdict(Use)
        self.drivers = 0
        seen = Rooms(node.used for node in hardware.nodes)
        self.rooms = Rooms(
            {name: amount - node.used.get(name, 0.0) for name, amount in node.total.items()} for node in hardware.nodes
        )
        for entry in entries:
            here = seen.take(entry.held, entry.workers) if entry.held else {}
            unseen = {name: need - entry.held.get(name, 0.0) for name, need in entry.each.items()}
            self.rooms.change(unseen, here, -1)
            more = self.rooms.take(entry.each, entry.workers - sum(here.values()))
            self._add(entry, [here, more, self.owe(entry, self.rooms, here, more)])

    @property
    def free(self) -> dict[str, float]:
        return _free(self.rooms, self._total)

    def holds(self, entry: Entry) -> bool:
        """Whether there would be room if the cluster were empty."""
        if entry.shape not in self._held:
            fits = sum(workers_on(size, entry.each) for size in self._sizes) if entry.workers else 0
            self._held[entry.shape] = fits >= entry.workers
        return self._held[entry.shape]

    def owe(self, entry: Entry, rooms: Rooms, *places: Places) -> Places:
        """Where its workers wait that have no place."""
        return rooms.owe(entry.each, entry.workers - sum(sum(some.values()) for some in places), self._sizes)

    def put(self, entry: Entry, places: Places) -> None:
        """On its nodes."""
        self.rooms.change(entry.each, places, -1)
        self._add(entry, [places])

    def remove(self, entry: Entry) -> None:
        self.give(entry, self.rooms, 1)
        self._places.pop(entry.id)
        self.used[entry.project].add(entry, -1)
        self.drivers -= entry.on_head

    def give(self, entry: Entry, rooms: Rooms, sign: int) -> None:
        """Puts what the entry has into the rooms (1), or takes it from them (-1)."""
        for places in self._places[entry.id]:
            rooms.change(entry.each, places, sign)

    def _add(self, entry: Entry, places: list[Places]) -> None:
        self._places[entry.id] = places
        self.used[entry.project].add(entry)
        self.drivers += entry.on_head

    def load(self, project: str, use: Use) -> float:
        """Dominant part of the cluster that a project uses, for its share."""
        parts = (amount / max(self._total.get(name, 0.0), EPS) for name, amount in use.has.items())
        return max(parts, default=0.0) / self.quota(project).share

    def head_is_full(self, drivers: int) -> bool:
        """With so many drivers on it."""
        return self.hardware.drivers is not None and drivers >= self.hardware.drivers

    def quota(self, project: str) -> Quota:
        return self._quotas.get(project, Quota())


def ordered(waiting: Iterable[Entry], cluster: Cluster) -> list[Entry]:
    """Those that wait, in the order in which they will run."""
    of_project: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in waiting:
        of_project[entry.project].append(entry)
    uses = {project: deepcopy(cluster.used[project]) for project in of_project}
    for entries in of_project.values():
        entries.sort(key=lambda entry: (entry.rank, *(-part for part in entry.place)))  # the next one is the last

    def turn(project: str) -> tuple[float, float, tuple[float, int], str]:
        first = of_project[project][-1]
        return -first.rank, cluster.load(project, uses[project]), first.place, project

    heap = [turn(project) for project in of_project]
    heapq.heapify(heap)
    found = []
    while heap:
        project = heap[0][-1]
        entry = of_project[project].pop()
        found.append(entry)
        uses[project].add(entry)
        if of_project[project]:
            heapq.heapreplace(heap, turn(project))
        else:
            heapq.heappop(heap)
    return found


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
        if not cluster.holds(entry):
            said = f"needs {_listed(entry)}, for which there would be no room if nothing ran here"
            yield entry, Wait(said, "misfit")
            continue
        if quota.gpus is not None and entry.most_gpus > quota.gpus + EPS:
            said = f"may have {entry.most_gpus:g} GPUs, project {entry.project} no more than {quota.gpus:g}"
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


def giving_way(blocked: Entry, running: Iterable[Entry], cluster: Cluster) -> list[Entry]:
    """The fewest running jobs of lower priority whose room `blocked` needs, those first that came last.

    Args:
        blocked: waits for room.
        running: that may be paused.
        cluster: without those that are about to stop.
    """
    rooms, drivers, found = Rooms(cluster.rooms.nodes), cluster.drivers, list[Entry]()

    def fits() -> bool:
        places = rooms.take(blocked.each, blocked.workers)
        rooms.change(blocked.each, places, 1)
        full = blocked.on_head and cluster.head_is_full(drivers)
        return sum(places.values()) == blocked.workers and not full

    lower = (entry for entry in running if entry.rank < blocked.rank)
    for entry in sorted(lower, key=lambda entry: (entry.rank, *(-part for part in entry.place))):
        if fits():
            break
        found.append(entry)
        cluster.give(entry, rooms, 1)
        drivers -= entry.on_head
    if not fits():
        return []
    for entry in [*found]:
        cluster.give(entry, rooms, -1)
        drivers += entry.on_head
        if fits():
            found.remove(entry)
        else:
            cluster.give(entry, rooms, 1)
            drivers -= entry.on_head
    return found


def _free(rooms: Rooms, names: Iterable[str]) -> dict[str, float]:
    """Of all nodes together."""
    return {name: sum(max(0.0, node.get(name, 0.0)) for node in rooms.nodes) for name in names}


def _lacks(entry: Entry, fit: int, rooms: Rooms) -> str:
    """What there is too little of, all together or node by node; `rooms` are without the workers that fit."""
    free = _free(rooms, entry.needs)
    has = {name: free[name] + fit * need for name, need in entry.each.items()}
    short = [f"{need:g} {name} ({has[name]:g} free)" for name, need in entry.needs.items() if need > has[name] + EPS]
    return f"needs {' and '.join(short) or f'{_listed(entry)} (the nodes have room for {fit})'}"


def _listed(entry: Entry) -> str:
    each = " and ".join(f"{need:g} {name}" for name, need in entry.each.items())
    return f"{entry.workers} workers of {each}" if entry.workers > 1 else each
