"""What there is, and who uses what of it: jobs, their projects, and what is no job. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.packing import EPS, Hardware, Places, Rooms, of_driver, workers_on

ARRIVES_S = 30.0  # a job for which there is room holds it by then: a group of Ray Train is there after about 20 s

Shape = tuple[int, tuple[tuple[str, float], ...]]


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
        most_workers: that it may grow to while it runs.
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
    most_workers: int = 1
    held: Mapping[str, float] = field(default_factory=dict)
    on_head: bool = True

    @classmethod
    def of(cls, job: Any, hardware: Hardware, now: float, seconds: float = math.inf) -> Entry:
        """Of a `store.Job`, or a row with its columns and `workers` of its spec.

        Args:
            job: the row.
            hardware: where it runs, or will.
            now: seconds since the epoch; inf: as if whoever starts held its room already.
            seconds: that it will run.
        """
        place = job.resumed_at or job.created_at, job.number
        needs = {name: need for name, need in {"CPU": job.cpus, "GPU": job.gpus, **job.custom}.items() if need}
        most_gpus = max(job.most_gpus, job.gpus)  # an older front end knows none of the first
        if job.origin == "outside" and job.submitted_at is None:  # and was never resumed here
            return cls(job.id, job.project, job.rank, place, {}, most_gpus, seconds, 0, 0, {}, on_head=False)
        asked = job.workers or 1
        least, most = asked if isinstance(asked, list) else (asked, asked)
        driver = of_driver(needs, most, grows=hardware.grows)
        trains_alone = most == 1 and not job.gpus
        held = driver if trains_alone else {name: need / least for name, need in needs.items()}
        if job.state == "STARTING" and now - (job.submitted_at or 0.0) < ARRIVES_S:
            held = {}  # Ray may not have come to it
        workers = least, most
        return cls(job.id, job.project, job.rank, place, needs, most_gpus, seconds, *workers, held, on_head=not driver)

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

    def add(self, entry: Entry, sign: int = 1, grown: int = 0) -> None:
        """`grown`: workers that it has beyond its least."""
        for name, need in entry.needs.items():
            more = grown * need / entry.workers
            self.has[name] += sign * (need + more)  # type: ignore[assignment]  # typeshed counts by int
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

        What Ray shows as used is taken to be theirs so far as it can be: first what each needs, then what elastic ones
        may have grown to. The rest is no job's room, but that of a served model, say. Whoever is not seen there has
        still to come.

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
        self._grown: dict[str, int] = {}  # workers beyond the least, of those that are seen to have any
        self.used: defaultdict[str, Use] = defaultdict(Use)
        self.drivers = 0
        seen = Rooms(node.used for node in hardware.nodes)
        self.rooms = Rooms(
            {name: amount - node.used.get(name, 0.0) for name, amount in node.total.items()} for node in hardware.nodes
        )
        running = list(entries)
        for entry in running:
            here = seen.take(entry.held, entry.workers) if entry.held else {}
            unseen = {name: need - entry.held.get(name, 0.0) for name, need in entry.each.items()}
            self.rooms.change(unseen, here, -1)
            more = self.rooms.take(entry.each, entry.workers - sum(here.values()))
            self._places[entry.id] = [here, more, self.owe(entry, self.rooms, here, more)]
        for entry in running:
            if entry.held and entry.most_workers > entry.workers:
                grown = seen.take(entry.held, entry.most_workers - entry.workers)
                self._places[entry.id].append(grown)
                self._grown[entry.id] = sum(grown.values())
            self._count(entry, 1)

    @property
    def free(self) -> dict[str, float]:
        return self.rooms.free(self._total)

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
        self._places[entry.id] = [places]
        self._count(entry, 1)

    def remove(self, entry: Entry) -> None:
        self.give(entry, self.rooms, 1)
        self._places.pop(entry.id)
        self._count(entry, -1)
        self._grown.pop(entry.id, None)

    def give(self, entry: Entry, rooms: Rooms, sign: int) -> None:
        """Puts what the entry has into the rooms (1), or takes it from them (-1)."""
        for places in self._places[entry.id]:
            rooms.change(entry.each, places, sign)

    def _count(self, entry: Entry, sign: int) -> None:
        self.used[entry.project].add(entry, sign, self._grown.get(entry.id, 0))
        self.drivers += sign * entry.on_head

    def load(self, project: str, use: Use) -> float:
        """Dominant part of the cluster that a project uses, for its share."""
        parts = (amount / max(self._total.get(name, 0.0), EPS) for name, amount in use.has.items())
        return max(parts, default=0.0) / self.quota(project).share

    def head_is_full(self, drivers: int) -> bool:
        """With so many drivers on it."""
        return self.hardware.drivers is not None and drivers >= self.hardware.drivers

    def quota(self, project: str) -> Quota:
        return self._quotas.get(project, Quota())
