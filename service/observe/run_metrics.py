"""Numbers of the jobs that run, by job id, from what their runs write; read at each scrape.

A scrape reads four small files of a run. Ids come and go with the jobs, so there are as many series as jobs run at a
time, at most `MOST` times the families below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.observe.families import counter, gauge
from service.store import Job, Store
from workloads.checkpoint_folder import latest_step, mirrored_step, read_seal, steps
from workloads.record import RunFolder
from workloads.spec_deploy import is_deploy

MOST = 500  # runs of a scrape: those that started last
GAUGES = {
    "step": "Optimizer steps done.",
    "total_steps": "Optimizer steps of the whole job.",
    "updated_timestamp_seconds": "When the run last said that it lives.",
    "warnings": "Warnings of the run, such as that it waits for data.",
    "loss": "Newest loss of the curve; absent where it is not finite.",
    "samples_per_second": "Samples trained on, over all workers.",
    "step_seconds": "Duration of an optimizer step.",
    "data_wait_ratio": "Share of the time that training waits for the loader.",
    "memory_bytes": "Most memory that the first worker held so far: of its GPU, or of the process.",
    "mfu_ratio": "Share of the peak of the GPUs that the model uses; absent where the peak is not known.",
    "checkpoint_step": "Step of the newest whole checkpoint.",
    "checkpoint_timestamp_seconds": "When the newest checkpoint was written.",
    "checkpoint_write_seconds": "What writing the newest checkpoint took, beside training.",
    "checkpoint_bytes": "Size of the newest checkpoint.",
    "mirror_backlog_checkpoints": "Checkpoints on the disk of the run that are newer than what the mirror has.",
}
COUNTERS = {
    "skipped_samples": "Samples that were damaged or could not be decoded.",
    "training_seconds": "Time spent training, over all attempts.",
}
OF_POINT = {  # metric -> key of a point of the curve, factor
    "loss": ("loss", 1),
    "samples_per_second": ("samples_per_s", 1),
    "step_seconds": ("step_time_s", 1),
    "data_wait_ratio": ("data_wait_share", 1),
    "memory_bytes": ("memory_gib", 2**30),
    "mfu_ratio": ("mfu", 1),
}


class RunMetrics(Collector):
    def __init__(self, store: Store, runs: Path) -> None:
        self._store, self._runs = store, runs

    def collect(self) -> Iterator[Metric]:
        with self._store.session() as session:
            running = sa.select(Job).where(Job.state == "RUNNING").order_by(Job.submitted_at.desc())
            jobs = [job for job in session.scalars(running.limit(MOST)) if not is_deploy(job.spec)]  # which has no run
        labels = {job.id: (job.project, job.id) for job in jobs}
        said = {job.id: of_run(RunFolder(self._runs / job.id), job.spec) for job in jobs}
        info = {(*labels[job.id], job.name, _kind(job.spec)): 1.0 for job in jobs}
        yield gauge(
            "manta_run_info", "Names of running jobs, to join by.", ["project", "job_id", "name", "method"], info
        )
        for make, families in ((gauge, GAUGES), (counter, COUNTERS)):
            for name, text in families.items():
                samples = {labels[job_id]: values[name] for job_id, values in said.items() if name in values}
                yield make(f"manta_run_{name}", text, ["project", "job_id"], samples)


def of_run(run: RunFolder, spec: Mapping[str, Any]) -> dict[str, float]:
    """What a run says of itself, by the name of the metric; what it does not say is left out."""
    found: dict[str, float] = {}
    try:
        record, point = run.read_record(), run.last_point()
    except (OSError, ValueError):  # a disk that is away, a file that somebody cut: the other runs are still told of
        return found
    if record is not None:
        found |= {
            "step": record.step,
            "total_steps": record.total_steps,
            "updated_timestamp_seconds": record.updated_at,
            "warnings": len(record.warnings),
            "skipped_samples": record.skipped_samples,
            "training_seconds": record.ran_s,
        }
    for name, (key, factor) in OF_POINT.items():
        if point is not None and point.get(key) is not None:
            found[name] = point[key] * factor
    return found | _of_checkpoints(run.checkpoints, mirrored=bool(spec.get("checkpoint", {}).get("mirror")))


def _of_checkpoints(folder: Path, *, mirrored: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    latest = latest_step(folder)
    if latest is not None and (seal := read_seal(folder, latest)) is not None:
        found = {
            "checkpoint_step": seal.step,
            "checkpoint_timestamp_seconds": seal.time,
            "checkpoint_bytes": sum(file.bytes for file in seal.files.values()),
        }
        if seal.seconds is not None:
            found["checkpoint_write_seconds"] = seal.seconds
    if mirrored:
        sent = mirrored_step(folder)
        found["mirror_backlog_checkpoints"] = sum(sent is None or step > sent for step in steps(folder))
    return found


def _kind(spec: Mapping[str, Any]) -> str:
    """The method of a job, or the search."""
    name: str = (spec.get("method") or spec["search"])["name"]
    return name
