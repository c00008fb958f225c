"""Whether a job fits at all: on the empty cluster, and into the quota of its project; if not, the smallest change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from service.queue import EPS, Quota
from workloads.preflight import Problem
from workloads.spec_training import Resources


def misfit(resources: Resources, nodes: Sequence[Mapping[str, float]], project: str, quota: Quota) -> Problem | None:
    """Why the job could never start; None where it can.

    Args:
        resources: that it asks for.
        nodes: resources of each node, as if nobody used them. [] where nobody knows: then only the quota is looked at.
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
    each = _listed(resources.of_one)
    if workers:
        message = f"got {resources.min_workers} workers of {each}, expected at most {workers}, which this cluster holds"
        return Problem(loc=["resources"], message=message, hint=_fewer(resources, workers))
    of_one = resources.of_one.items()
    most = max(nodes, key=lambda node: sum(min(node.get(name, 0.0) / need, 1.0) for name, need in of_one))
    has = {name: math.floor(most.get(name, 0.0)) for name in resources.of_one}
    message = f"got workers of {each}, expected at most the {_listed(has)} of a node"
    fields = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker"}
    changes = [
        f"resources.{fields.get(name, f'custom_per_worker.{name}')}: {has[name]}"
        for name, need in of_one
        if need > has[name] + EPS
    ]
    return Problem(loc=["resources"], message=message, hint=f"{' and '.join(changes)} fits")


def _workers_on(node: Mapping[str, float], resources: Resources) -> int:
    """How many workers a node holds."""
    return min(int((node.get(name, 0.0) + EPS) // need) for name, need in resources.of_one.items())


def _listed(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def _fewer(resources: Resources, workers: int) -> str:
    if isinstance(resources.workers, int):
        return f"resources.workers: {workers} fits"
    return f"resources.workers: [{min(workers, resources.min_workers)}, {workers}] fits"
