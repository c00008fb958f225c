"""The islands of a search that ended -> its artifact."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workloads import winner
from workloads.explore import IslandFile, search_of
from workloads.models.encoders import build_encoder, model_config
from workloads.record import RunFolder
from workloads.search.base import Search, Winner
from workloads.search.evolution import Evolution
from workloads.search.latency import Precision, device_name, measure
from workloads.spec import Named
from workloads.spec_search import SearchSpec

logger = logging.getLogger(__name__)

BATCH_SIZE = 64  # of the latency that every winner is measured by, as in Zen-NAS and GENet
MOST_MACS = 2e10  # of a batch on a CPU, about a second: larger networks see fewer images at once
Scan = Callable[..., Any]


def conclude(spec: SearchSpec, run: RunFolder, home: Path, job_id: str, scan: Scan) -> winner.Found:
    """Writes what was found into `run.artifact`.

    Args:
        spec: the job.
        run: its folder, with all islands at their end.
        home: where references to weights are looked up.
        job_id: of the job.
        scan: `Place.scan`: the winner is measured where candidates were.

    Raises:
        ValueError: no candidate met the budget.
    """
    states = [state for n in range(spec.islands) if (state := IslandFile(run, n).read()) is not None]
    search = _together(spec, home, states)
    best = search.winner()
    fronts = search.fronts() if isinstance(search, Evolution) else {}
    found = winner.Found(
        job_id=job_id,
        spec=spec,
        paper=search.paper,
        structure=best.structure,
        model=best.model,
        score=best.score,
        costs=best.costs,
        latency=_latency(best, scan),
        blocks=best.blocks,
        **{name: sum(state[name] for state in states) for name in ("told", "scored", "spent")},
    )
    winner.write(run.artifact, found, _rows(search, fronts), best.weights)
    return found


def _together(spec: SearchSpec, home: Path, states: list[dict[str, Any]]) -> Search:
    """The island with the best member, and the members of the others."""
    cpu = torch.device("cpu")
    islands = [search_of(spec, home, cpu, number) for number in range(len(states))]
    for search, state in zip(islands, states, strict=True):
        search.restore(state["search"])
    rows = [search.population() for search in islands]
    first, *others = sorted(range(len(islands)), key=lambda n: -rows[n][0].get("score", 0.0) if rows[n] else math.inf)
    for n in others:
        for row in rows[n]:
            islands[first].immigrate(row)
    return islands[first]


def _rows(search: Search, fronts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Population, best first, then what else is on a front; columns say which."""
    kept = {row["candidate"]: row | {"in_population": True} for row in search.population()}
    for cost, rows in fronts.items():
        for row in rows:
            kept.setdefault(row["candidate"], row | {"in_population": False})[f"on_front_{cost}"] = True
    columns = ["in_population", *(f"on_front_{cost}" for cost in fronts)]
    return [dict.fromkeys(columns, False) | row for row in kept.values()]


def _latency(best: Winner, scan: Scan) -> winner.Latency:
    named = Named.model_validate(best.model)
    size: Any = model_config(named).image_size  # type: ignore[attr-defined]
    return winner.Latency.model_validate(scan(measured, build_encoder(named), size, best.costs["flops"]))


def measured(network: nn.Module, size: int, flops: float) -> dict[str, Any]:
    """What `scan` calls, where the network is."""
    device = next(network.parameters()).device
    cuda = device.type == "cuda"
    precision: Precision = "fp16" if cuda else "fp32"
    batch_size = BATCH_SIZE if cuda else max(1, min(BATCH_SIZE, int(MOST_MACS / flops)))
    ms = measure(network, size=size, batch_size=batch_size, precision=precision, device=device)
    return {"ms": ms, "device": device_name(device), "batch_size": batch_size, "precision": precision}
