"""Where each job that waits stands in the queue, why it waits, and when it may start: for people, not for decisions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict

import sqlalchemy as sa

from service.errors import Unavailable
from service.fitting import misfit
from service.packing import Hardware, together
from service.projects import quota_of
from service.queue import admitted, ordered, starts
from service.ray_jobs import RayJobs
from service.store import ACTIVE, Job, Project, Store
from service.usage import Cluster, Entry, Quota
from workloads.spec_any import parse_spec

FRESH_S = 2.0  # an answer may be so old: a long list of jobs reads the queue once
REST = 20  # times as long as a reading took, before a job that came since then has the queue read again
FORESEEN = 200  # jobs at the front, whose start is worked out
PLAYED = 32  # nodes; of more it is worked out as if they were one: on 1,000 it took seconds
COLUMNS = (
    *(Job.id, Job.number, Job.project, Job.state, Job.held, Job.reason, Job.rank, Job.workload, Job.origin),
    *(Job.created_at, Job.resumed_at, Job.submitted_at, Job.started_at),
    *(Job.cpus, Job.gpus, Job.custom, Job.most_gpus, Job.step, Job.best_step, Job.total_steps),
    Job.spec[("resources", "workers")].label("workers"),
)


class Place(TypedDict):
    """`position` from 1 among `length`, None before that; `expected_start` in seconds since the epoch."""

    position: int | None
    length: int
    expected_start: float | None
    reason: str | None


class Standing:
    """Answers from one reading of the table for a while."""

    def __init__(self, store: Store, ray: RayJobs, clock: Callable[[], float] = time.time) -> None:
        self._store, self._ray, self._clock = store, ray, clock
        self._read_at, self._places = -math.inf, dict[str, Place | None]()
        self._hardware, self._quotas, self._misfits = Hardware([]), dict[str, Quota](), set[str]()
        self._rests_until = -math.inf  # before that no job that is new to it has the queue read again

    def of(self, job: Job) -> Place | None:
        """None for a job that is not in the queue; one that waits for other jobs has no position yet."""
        if job.state != "QUEUED" or not (job.cpus or job.held):
            return None
        places, began = self._places, time.perf_counter()
        stale = not 0 <= self._clock() - self._read_at < FRESH_S
        if stale or (job.id not in places and began > self._rests_until):
            self._read_at, self._rests_until = self._clock(), math.inf  # other threads do not read meanwhile
            try:
                self._places = places = {job.id: None, **self._read()}  # it may have left the queue at this moment
            finally:
                ended = time.perf_counter()
                self._rests_until = ended + REST * (ended - began)
        if job.id not in places:
            return {"position": None, "length": len(places), "expected_start": None, "reason": "came this moment"}
        place = places[job.id]
        if place and job.id in self._misfits:
            return {**place, "reason": self._too_large(job) or place["reason"]}
        return place

    def _too_large(self, job: Job) -> str | None:
        """What could be changed about a job for which there would be no room if nothing ran; worked out when asked."""
        nodes, quota = [node.total for node in self._hardware.nodes], self._quotas.get(job.project, Quota())
        try:
            problem = misfit(parse_spec(job.spec), nodes, job.project, quota)
        except ValueError:  # of an older version
            return None
        return f"{problem.message}, so others pass it until that changes; {problem.hint}" if problem else None

    def _read(self) -> dict[str, Place]:
        with self._store.session() as session:
            rows = session.execute(sa.select(*COLUMNS).where(Job.state.in_(("QUEUED", *ACTIVE)))).all()
            took, unfinished = Job.finished_at - Job.started_at, sa.orm.aliased(Job)
            wanted = sa.select(unfinished.workload).where(unfinished.state.in_(("QUEUED", *ACTIVE)))
            earlier = sa.select(Job.workload, sa.func.avg(took)).where(Job.state == "SUCCEEDED", took >= 0)
            earlier = earlier.where(Job.workload.in_(wanted)).group_by(Job.workload)
            seconds = {name: found for name, found in session.execute(earlier)}
            quotas = {row.name: quota_of(row) for row in session.scalars(sa.select(Project))}
        held = [row for row in rows if row.held and row.state == "QUEUED"]
        hardware, away = Hardware([]), None
        try:
            hardware = self._ray.hardware()
        except Unavailable as error:
            away = error.detail
        waiting = [
            Entry.of(row, hardware, self._read_at, _seconds(row, seconds))
            for row in rows
            if row.state == "QUEUED" and not row.held and row.cpus
        ]
        running = [
            Entry.of(row, hardware, self._read_at, self._remaining(row, seconds))
            for row in rows
            if row.state in ACTIVE and row.cpus
        ]
        queue = ordered(waiting, Cluster(hardware, quotas, running))
        waits = {entry.id: wait for entry, wait in admitted(queue, Cluster(hardware, quotas, running)) if wait}
        reasons = {entry.id: away or (waits[entry.id].reason if entry.id in waits else None) for entry in queue}
        misfits = () if away else (name for name, wait in waits.items() if wait.kind == "misfit")
        self._hardware, self._quotas, self._misfits = hardware, quotas, set(misfits)
        front = [] if away else [entry for entry in queue[:FORESEEN] if entry.id not in self._misfits]
        if len(hardware.nodes) > PLAYED:
            hardware = replace(hardware, nodes=[together(hardware.nodes)])
        after = starts(front, running, Cluster(hardware, quotas, running))
        found: dict[str, Place] = {
            entry.id: {
                "position": i,
                "length": len(queue),
                "expected_start": self._read_at + after[entry.id] if entry.id in after else None,
                "reason": reasons[entry.id],
            }
            for i, entry in enumerate(queue, 1)
        }
        for row in held:
            found[row.id] = {"position": None, "length": len(queue), "expected_start": None, "reason": row.reason}
        return found

    def _remaining(self, row: Any, earlier: dict[str, float]) -> float:
        """Seconds that a running job goes on: by the steps of this attempt, else by earlier jobs that were alike."""
        if row.state in ("PAUSING", "CANCELLING"):
            return 0.0
        now, begun = self._clock(), row.submitted_at or row.started_at or self._clock()
        if row.total_steps and (done := row.step - row.best_step) > 0:
            return float((row.total_steps - row.step) * (now - begun) / done)
        return max(0.0, _seconds(row, earlier) - (now - begun))


def _seconds(row: Any, earlier: dict[str, float]) -> float:
    """That a job takes which starts anew."""
    return float(earlier.get(row.workload, math.inf))
