"""Who runs next: priorities, fair shares and quotas of projects. Pure: a cluster and a clock can be made up.

Of the jobs that wait the one goes first whose priority is highest; among those one of the project that uses least of
the cluster for its share (of CPUs, GPUs or others, whichever is most: dominant resource fairness, NSDI 2011); among
those the one that came first. A job for which there is no room keeps what there is of it, so that nobody behind it can
take that away; one that its project's quota holds back keeps its part of the quota, and nothing of the cluster.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Priority = Literal["low", "normal", "high"]
RANKS: dict[Priority, int] = {"low": -1, "normal": 0, "high": 1}

EPS = 1e-6  # of a GPU: sums of fractions


class Wait(NamedTuple):
    """Why an entry does not start: there is no room, or the quota of its project is used."""

    reason: str
    by_quota: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """What the queue knows of a job.

    Attributes:
        id: of the job.
        project: whose it is.
        rank: of its priority; more is sooner.
        place: when it came, and its number.
        needs: to start, by the names of Ray.
        most_gpus: that it may grow to; what quotas count.
        seconds: how long it will run, or goes on running; inf: nobody knows.
    """

    id: str
    project: str
    rank: int
    place: tuple[float, int]
    needs: Mapping[str, float]
    most_gpus: float
    seconds: float = math.inf

    @classmethod
    def of(cls, job: Any, seconds: float = math.inf) -> Entry:
        """Of a `store.Job`, or a row with its columns."""
        place = job.resumed_at or job.created_at, job.number
        needs = {name: need for name, need in {"CPU": job.cpus, "GPU": job.gpus, **job.custom}.items() if need}
        most_gpus = max(job.most_gpus, job.gpus)  # an older front end knows none of the first
        return cls(job.id, job.project, job.rank, place, needs, most_gpus, seconds)


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


@dataclass
class Cluster:
    """What there is, and who uses what of it.

    Attributes:
        total: by the names of Ray, or what an autoscaler may add to.
        quotas: of projects that have one.
        used: by project.
    """

    total: Mapping[str, float]
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    used: defaultdict[str, Use] = field(default_factory=lambda: defaultdict(Use))

    @classmethod
    def running(cls, total: Mapping[str, float], quotas: Mapping[str, Quota], entries: Iterable[Entry]) -> Cluster:
        """The cluster with these on it."""
        cluster = cls(total, quotas)
        for entry in entries:
            cluster.used[entry.project].add(entry)
        return cluster

    @property
    def free(self) -> defaultdict[str, float]:
        free = defaultdict(float, self.total)
        for use in self.used.values():
            for name, amount in use.has.items():
                free[name] -= amount
        return free

    def load(self, project: str, use: Use) -> float:
        """Dominant part of the cluster that a project uses, for its share."""
        parts = (amount / max(self.total.get(name, 0.0), EPS) for name, amount in use.has.items())
        return max(parts, default=0.0) / self.quota(project).share

    def quota(self, project: str) -> Quota:
        return self.quotas.get(project, Quota())


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
    free, promised = cluster.free, Counter[str]()  # GPUs of the quotas of projects, to those that wait for them
    for entry in queue:
        use, quota = cluster.used[entry.project], cluster.quota(entry.project)
        if quota.running is not None and use.running >= quota.running:
            yield entry, Wait(f"project {entry.project} runs {use.running} jobs, as many as it may", by_quota=True)
            continue
        most = use.most_gpus + promised[entry.project] + entry.most_gpus
        if quota.gpus is not None and entry.most_gpus and most > quota.gpus + EPS:
            promised[entry.project] += entry.most_gpus  # type: ignore[assignment]  # typeshed counts by int
            said = f"project {entry.project} has {use.most_gpus:g} of the {quota.gpus:g} GPUs that it may have"
            yield entry, Wait(said, by_quota=True)
            continue
        lacks = [f"{entry.needs[name]:g} {name} ({max(0.0, free[name]):g} free)" for name in lacking(entry, free)]
        for name, need in entry.needs.items():
            free[name] -= need
        if not lacks:
            use.add(entry)
        yield entry, Wait(f"needs {' and '.join(lacks)}", by_quota=False) if lacks else None


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
        cluster.used[ended.project].add(ended, -1)
    return found


def giving_way(blocked: Entry, running: Iterable[Entry], cluster: Cluster) -> list[Entry]:
    """The fewest running jobs of lower priority whose room `blocked` needs, those first that came last.

    Args:
        blocked: waits for room.
        running: that may be paused.
        cluster: without those that are about to stop.
    """
    free, found = cluster.free, list[Entry]()

    def freed(entry: Entry, sign: int = 1) -> defaultdict[str, float]:
        changed = defaultdict(float, free)
        for name, need in entry.needs.items():
            changed[name] += sign * need
        return changed

    lower = (entry for entry in running if entry.rank < blocked.rank)
    for entry in sorted(lower, key=lambda entry: (entry.rank, *(-part for part in entry.place))):
        if not lacking(blocked, free):
            break
        found.append(entry)
        free = freed(entry)
    if lacking(blocked, free):
        return []
    for entry in [*found]:
        if not lacking(blocked, less := freed(entry, -1)):
            found.remove(entry)
            free = less
    return found


def lacking(entry: Entry, free: Mapping[str, float]) -> list[str]:
    """Names of what there is too little of."""
    return [name for name, need in entry.needs.items() if need > free[name] + EPS]
