"""Who gives way: running jobs of lower priority, to one that has no room.

Nobody is paused for room that comes by itself. So the cluster is looked at here as it will be in a moment, when those
that start hold what Ray shows as used, those that stop have stopped, and those that just left are no longer shown.
Whether a job starts is asked with less hope (`service.queue`): it would only wait in Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from service.packing import Hardware, Rooms
from service.queue import Wait, admitted
from service.store import Job
from service.usage import Cluster, Entry, Quota

GIVEN_BACK_S = 3.0  # Ray shows the room of a job that ended as free by then

Verdict = tuple[Entry, Wait | None]


class Preemption:
    """Remembers who just left the cluster."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, int], tuple[float, Job]] = {}  # by job and attempt

    def left(self, job: Job, now: float) -> None:
        """Its attempt has ended; `job` as it was before."""
        self._left[job.id, job.attempt] = now, job

    def choose(
        self,
        verdicts: Sequence[Verdict],
        active: Sequence[Job],
        hardware: Hardware,
        quotas: Mapping[str, Quota],
        now: float,
    ) -> tuple[str, list[str]]:
        """The first job that will have no room, and those that give way to it: ids, empty where there are none.

        Args:
            verdicts: of `admitted`.
            active: that are on the cluster, or were when the round began.
            hardware: what there is.
            quotas: by project.
            now: seconds since the epoch.
        """
        self._left = {key: (at, job) for key, (at, job) in self._left.items() if 0 <= now - at < GIVEN_BACK_S}
        if _first_without_room(verdicts) is None:
            return "", []
        jobs = {job.id: job for job in active}
        for _, job in self._left.values():
            jobs.setdefault(job.id, job)
        entries = {job.id: Entry.of(job, hardware, math.inf) for job in jobs.values()}
        cluster = Cluster(hardware, quotas, entries.values())
        for job in jobs.values():
            if job.state in ("PAUSING", "CANCELLING") or (job.id, job.attempt) in self._left:
                cluster.remove(entries.pop(job.id))
        list(admitted([entry for entry, wait in verdicts if wait is None], cluster))  # those start in this round
        later = list(admitted([entry for entry, wait in verdicts if wait is not None], cluster))
        if (blocked := _first_without_room(later)) is None:
            return "", []
        return blocked.id, [entry.id for entry in giving_way(blocked, entries.values(), cluster)]


def _first_without_room(verdicts: Iterable[Verdict]) -> Entry | None:
    return next((entry for entry, wait in verdicts if wait is not None and wait.kind in ("room", "head")), None)


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
