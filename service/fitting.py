"""Whether a job fits at all: on the empty cluster, and into the quota of its project; if not, the smallest change."""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.queue import EPS, Quota
from workloads.preflight import Problem
from workloads.spec_training import Resources


def misfit(resources: Resources, nodes: Sequence[dict[str, float]], project: str, quota: Quota) -> Problem | None:
    """Why the job could never start; None where it can.

    Args:
        resources: that it asks for.
        nodes: CPUs and GPUs of each node; nobody uses them. [] where nobody knows: then only the quota is looked at.
        project: whose it is.
        quota: of the project.
    """
    if quota.gpus is not None and resources.most_gpus > quota.gpus + EPS:
        workers = int((quota.gpus + EPS) // resources.gpus_per_worker)
        hint = _fewer(resources, workers) if workers else f"resources.gpus_per_worker: {quota.gpus:g} fits"
        message = f"got {resources.most_gpus:g} GPUs, expected at most {quota.gpus:g}, the quota of project {project}"
        return Problem(loc=["resources"], message=message, hint=hint)
    if not nodes:
        return None
    workers = sum(_workers_on(node, resources) for node in nodes)
    if workers >= resources.min_workers:
        return None
    gpus = f" and {resources.gpus_per_worker:g} GPUs" if resources.gpus_per_worker else ""
    each = f"of {resources.cpus_per_worker} CPUs{gpus}"
    if workers:
        message = f"got {resources.min_workers} workers {each}, expected at most {workers}, which this cluster holds"
        return Problem(loc=["resources"], message=message, hint=_fewer(resources, workers))
    most = max(nodes, key=lambda node: (min(node["GPU"], resources.gpus_per_worker), node["CPU"]))
    message = f"got workers {each}, expected at most {most['CPU']:g} CPUs and {most['GPU']:g} GPUs, the largest node's"
    changes = [
        f"resources.{name}_per_worker: {has:g}"
        for name, asked, has in (
            ("cpus", resources.cpus_per_worker, math.floor(most["CPU"])),
            ("gpus", resources.gpus_per_worker, most["GPU"]),
        )
        if asked > has
    ]
    return Problem(loc=["resources"], message=message, hint=f"{' and '.join(changes)} fits")


def _workers_on(node: dict[str, float], resources: Resources) -> int:
    """How many workers a node holds."""
    needs = (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker))
    return min(int((node[name] + EPS) // need) for name, need in needs if need)


def _fewer(resources: Resources, workers: int) -> str:
    if isinstance(resources.workers, int):
        return f"resources.workers: {workers} fits"
    return f"resources.workers: [{min(workers, resources.min_workers)}, {workers}] fits"
