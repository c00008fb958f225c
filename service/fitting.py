"""Whether a job fits at all: on the empty cluster, and into the quota of its project; if not, the smallest change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from service.packing import EPS, workers_on
from service.usage import Quota
from workloads.preflight import Problem
from workloads.spec_any import AnySpec
from workloads.spec_training import Resources

FIELDS = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker"}  # others are custom

Nodes = Sequence[Mapping[str, float]]


def misfit(spec: AnySpec, nodes: Nodes, project: str, quota: Quota) -> Problem | None:
    """Why the job could never start; None where it can.

    Args:
        spec: of the job; the hint is a change of its resources after which it is one, and fits.
        nodes: resources of each node, as if nobody used them. [] where nobody knows: then only the quota is looked at.
        project: whose it is.
        quota: of the project.
    """
    message = _too_large(spec.resources, nodes, project, quota)
    if message is None:
        return None
    hint = next(_changes(spec, nodes, quota), "no smaller one fits: ask for other resources, nodes or quotas")
    return Problem(loc=["resources"], message=message, hint=hint)


def _too_large(resources: Resources, nodes: Nodes, project: str, quota: Quota) -> str | None:
    """What was got, and what could be at most."""
    if quota.gpus is not None and resources.most_gpus > quota.gpus + EPS:
        return f"got {resources.most_gpus:g} GPUs, expected at most {quota.gpus:g}, the quota of project {project}"
    if not nodes:
        return None
    workers = sum(workers_on(node, resources.of_one) for node in nodes)
    if workers >= resources.min_workers:
        return None
    each = _listed(resources.of_one)
    if workers:
        return f"got {resources.min_workers} workers of {each}, expected at most {workers}, which this cluster holds"
    most = {name: _whole(amount) for name, amount in _largest(nodes, resources.of_one)[0].items()}
    return f"got workers of {each}, expected at most the {_listed(most)} of a node"


def _changes(spec: AnySpec, nodes: Nodes, quota: Quota) -> Iterator[str]:
    """What would fit, in the order of preference: fewer workers, smaller ones, fewer smaller ones.

    The spec itself says what is no job: a batch that the workers cannot share, none of what there must be some.
    """
    resources, each = spec.resources, spec.resources.of_one
    gpus = math.inf if quota.gpus is None else quota.gpus
    most = {name: gpus if name == "GPU" else math.inf for name in each}
    rooms = _largest(nodes, each) or [each]
    for size in (each, *({name: _whole(min(room[name], most[name])) for name in each} for room in rooms)):
        smaller = {name: min(need, size[name]) for name, need in each.items()}
        needs = {name: need for name, need in smaller.items() if need}
        if not needs:
            continue
        room = sum(workers_on(node, needs) for node in nodes) if nodes else math.inf
        workers = min(resources.max_workers, (gpus + EPS) // needs["GPU"] if "GPU" in needs else math.inf)
        workers = int(workers if room >= resources.min_workers else min(workers, room))
        change = {name: need for name, need in smaller.items() if need != each[name]}
        for fewer in range(workers, 0, -1):
            if _is_job(spec, change, fewer):
                said = [f"{_field(name)}: {need:g}" for name, need in change.items()]
                if fewer != resources.max_workers:
                    said.append(f"resources.workers: {_workers(resources, fewer)}")
                yield f"{' and '.join(said)} fits"
                break


def _field(name: str) -> str:
    return f"resources.{FIELDS.get(name) or f'custom_per_worker.{name}'}"


def _is_job(spec: AnySpec, change: Mapping[str, float], workers: int) -> bool:
    """Whether it is one with so many workers that need less; `change` is by the names of Ray."""
    resources: dict[str, Any] = spec.resources.model_dump() | {"workers": _workers(spec.resources, workers)}
    for name, need in change.items():
        holder, field = (resources, FIELDS[name]) if name in FIELDS else (resources["custom_per_worker"], name)
        holder[field] = int(need) if float(need).is_integer() else need
    try:
        type(spec).model_validate(spec.model_dump() | {"resources": resources})
    except ValidationError:
        return False
    return True


def _workers(resources: Resources, most: int) -> int | list[int]:
    return most if isinstance(resources.workers, int) else [min(most, resources.min_workers), most]


def _largest(nodes: Nodes, each: Mapping[str, float]) -> list[dict[str, float]]:
    """What the nodes have of what a worker needs, those that come nearest to it first."""
    sizes = {tuple(node.get(name, 0.0) for name in each): None for node in nodes}
    found = [dict(zip(each, size, strict=True)) for size in sizes]
    return sorted(found, key=lambda has: -sum(min(has[name] / need, 1.0) for name, need in each.items()))


def _whole(amount: float) -> float:
    """Ray gives out parts of one, and whole ones."""
    return amount if amount < 1 or math.isinf(amount) else math.floor(amount + EPS)


def _listed(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())
