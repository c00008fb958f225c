"""Numbers of the table of jobs, asked for at each scrape: right after a restart, and the same at every front end.

Of several front ends of one database take the `max`, not the `sum`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, get_args

import sqlalchemy as sa
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.observe.families import Samples, counter, gauge
from service.store import ACTIVE, TERMINAL, Deployment, DeploymentState, Job, JobEvent, JobState, Project, Store

STATES: tuple[JobState, ...] = get_args(JobState)
WANTING: tuple[JobState, ...] = ("QUEUED", *ACTIVE)  # they ask for resources, or have them
JOBS = sa.select(
    Job.project,
    Job.state,
    Job.held,
    sa.func.count().label("jobs"),
    sa.func.sum(Job.attempt).label("attempts"),
    sa.func.sum(Job.cpus).label("cpus"),
    sa.func.sum(Job.gpus).label("gpus"),
    sa.func.min(sa.func.coalesce(Job.resumed_at, Job.created_at)).label("since"),
).group_by(Job.project, Job.state, Job.held)
# Of the events, since a job that is tried again takes its end back, and a counter must not fall.
ENDED = (
    sa.select(Job.project, JobEvent.kind, sa.func.count())
    .join(Job, Job.number == JobEvent.job_number)
    .where(JobEvent.kind.in_([state.lower() for state in TERMINAL]))
    .group_by(Job.project, JobEvent.kind)
)
DEPLOYMENTS = sa.select(Deployment.state, sa.func.count()).group_by(Deployment.state)


class TableMetrics(Collector):
    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        with self._store.session() as session:
            rows = session.execute(JOBS).all()
            ended = {(project, kind.upper()): n for project, kind, n in session.execute(ENDED)}
            deployments = {(state,): n for state, n in session.execute(DEPLOYMENTS)}
            projects = {*session.scalars(sa.select(Project.name)), *(row.project for row in rows)}
        yield from _of_jobs(sorted(projects), rows)
        ends = {key: ended.get(key, 0) for key in product(sorted(projects), TERMINAL)}
        yield counter("manta_jobs_ended", "Times that jobs came to an end.", ["project", "state"], ends)
        served = {(state,): deployments.get((state,), 0) for state in get_args(DeploymentState)}
        yield gauge("manta_deployments", "Models that are served, or about to be.", ["state"], served)


def _of_jobs(projects: list[str], rows: Iterable[Any]) -> Iterator[Metric]:
    by_state: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in ("jobs", "cpus", "gpus")}
    totals: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in ("jobs", "attempts", "held", "waiting")}
    oldest = {}
    for row in rows:
        for name, counts in by_state.items():
            counts[row.project, row.state] += getattr(row, name)
        totals["jobs"][row.project,] += row.jobs
        totals["attempts"][row.project,] += row.attempts
        if row.state == "QUEUED":
            totals["held" if row.held else "waiting"][row.project,] += row.jobs
            if not row.held:
                oldest[row.project,] = row.since

    def states(name: str, of: tuple[JobState, ...]) -> Samples:
        return {key: by_state[name][key] for key in product(projects, of)}

    def total(name: str) -> Samples:
        return {(project,): totals[name][project,] for project in projects}

    by, each = ["project"], ["project", "state"]
    yield gauge("manta_jobs", "Jobs by state.", each, states("jobs", STATES))
    yield gauge("manta_jobs_cpus", "CPUs that unfinished jobs ask for or have.", each, states("cpus", WANTING))
    yield gauge("manta_jobs_gpus", "GPUs that unfinished jobs ask for or have.", each, states("gpus", WANTING))
    yield gauge("manta_queue_jobs", "Queued jobs that wait for room.", by, total("waiting"))
    yield gauge("manta_queue_held_jobs", "Queued jobs that wait for other jobs.", by, total("held"))
    since = "When the job that has waited longest for room came into the queue; absent where none waits."
    yield gauge("manta_queue_oldest_timestamp_seconds", since, by, oldest)
    yield counter("manta_jobs_submitted", "Jobs that were accepted.", by, total("jobs"))
    yield counter(
        "manta_job_attempts", "Attempts of jobs that were begun, those after a pause among them.", by, total("attempts")
    )
