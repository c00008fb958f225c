"""How long a job will take: by earlier runs of the same shape, else by the peak of a GPU that is named.

Two jobs have one shape where what a step computes, and on what, is the same; their data may differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from service.principal import ALL
from service.settings import Settings
from service.store import Job, Store
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_any import AnySpec

SHAPE = ("method", "model", "batch_size", "micro_batch_size", "precision", "engine", "search", "islands", "resources")
LENGTH = ("epochs", "steps", "data", "evaluate", "max_duration")
LOOK_BACK = 1000  # jobs
ENOUGH = 5  # runs
UTILISATION = 0.4  # of a GPU's peak, where nothing was measured; `manta estimate` takes the same

Measured = tuple[float | None, list[str]]  # seconds of a step; the jobs that tell it


def step_time(store: Store, settings: Settings, spec: AnySpec, project: str) -> Measured:
    """Median seconds of a step, or of a candidate, of the newest runs of the shape, and which they are.

    Args:
        store: its table of jobs.
        settings: say where runs are.
        spec: what is about to run.
        project: whose jobs count, or `*`.
    """
    times, runs = [], []
    for job_id in _alike(store, _shape(spec.model_dump(mode="json")), project):
        points = RunFolder(settings.runs / job_id).read_metrics()
        if found := [point["step_time_s"] for point in points if point.get("step_time_s")]:
            times.append(statistics.median(found))
            runs.append(job_id)
        if len(runs) == ENOUGH:
            break
    return (statistics.median(times) if times else None), runs


def _alike(store: Store, shape: dict[str, Any], project: str) -> Iterator[str]:
    query = sa.select(Job.id, Job.spec).where(Job.attempt > 0).order_by(Job.number.desc()).limit(LOOK_BACK)
    if project != ALL:
        query = query.where(Job.project == project)
    with store.session() as session:
        rows = session.execute(query).all()
    return (job_id for job_id, spec in rows if _shape(spec) == shape)


def workload(spec: AnySpec) -> str:
    """The same of jobs that should take equally long: of one shape, and as much of it."""
    document = spec.model_dump(mode="json")
    return hashlib.sha256(json.dumps([document.get(name) for name in (*SHAPE, *LENGTH)]).encode()).hexdigest()


def _shape(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: spec.get(name) for name in SHAPE}


def forecast(spec: AnySpec, costs: dict[str, Any], measured: Measured, gpu: str | None) -> dict[str, Any]:
    """What a dry run answers: what `workloads.dry_run` found, and the time.

    Args:
        spec: the job.
        costs: a `Training` or a `Searching`, as JSON.
        measured: of `step_time`.
        gpu: as its driver names it.
    """
    seconds, runs = measured
    source = "earlier runs" if runs else None
    flops = costs.get("step_flops")
    if seconds is None and gpu is not None and flops is not None and isinstance(spec, JobSpec):
        from workloads.flops import peak_of

        if (peak := peak_of(gpu, spec.precision)) is not None:
            seconds = flops / (peak * UTILISATION * spec.resources.max_workers)
            source = f"{UTILISATION:.0%} of the peak of {spec.resources.max_workers} {gpu}"
    steps = costs.get("steps", costs.get("candidates"))
    decode_s = costs.get("decode_s")
    return {
        "name": spec.name,
        spec.about[0]: spec.about[1],
        **costs,
        "step_time_s": seconds,
        "eta_s": None if seconds is None or steps is None else seconds * steps,
        "eta_from": source,
        "earlier_runs": runs,
        "decode_cores": None if seconds is None or decode_s is None else math.ceil(decode_s / seconds),
    }
