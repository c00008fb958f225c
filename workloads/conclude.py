"""The islands of a search that ended -> its artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workloads import winner
from workloads.explore import IslandFile, search_of
from workloads.found_latency import measured
from workloads.models.encoders import model_config
from workloads.record import RunFolder
from workloads.search.base import Search, Winner
from workloads.search.pareto import Row, front, spread
from workloads.spec import Named
from workloads.spec_search import SearchSpec

COSTS = ("flops", "latency_ms")  # of the Pareto fronts
MEASURED = 12  # networks of the front by FLOPs, where latency was no budget
Scan = Callable[..., Any]


def conclude(spec: SearchSpec, run: RunFolder, home: Path, job_id: str, scan: Scan) -> bool:
    """Writes what was found into `run.artifact`; False when it was stopped.

    Args:
        spec: the job.
        run: its folder, with all islands at their end.
        home: where references to weights are looked up.
        job_id: of the job.
        scan: `Place.scan`: what was found is measured where candidates were.

    Raises:
        ValueError: no candidate met the budget.
    """
    states = [state for n in range(spec.islands) if (state := IslandFile(run, n).read()) is not None]
    search = _together(spec, home, states)
    best, networks = search.winner(), search.networks()
    kept = _kept(search.population(), networks)
    networks = [kept[row["candidate"]] for row in networks]
    timed = _to_measure(best, networks)
    size: Any = model_config(Named.model_validate(best.model)).image_size  # type: ignore[attr-defined]
    flops = max([best.costs["flops"], *(row["flops"] for row in networks if row["candidate"] in timed)])
    latencies = scan(measured, nn.Linear(1, 1), spec, run, home, timed, size, flops)
    if len(latencies) < len(timed):
        return False
    for candidate, latency in zip(timed, latencies, strict=True):
        kept[candidate].setdefault("latency_ms", latency["ms"])
    for cost in COSTS:
        for row in front(networks, cost):
            row[f"on_front_{cost}"] = True
    found = winner.Found(
        job_id=job_id,
        spec=spec,
        paper=search.paper,
        structure=best.structure,
        model=best.model,
        score=best.score,
        costs=best.costs,
        latency=winner.Latency.model_validate(latencies[0]),
        blocks=best.blocks,
        **{name: sum(state[name] for state in states) for name in ("told", "scored", "spent")},
    )
    winner.write(run.artifact, found, [*kept.values()], best.weights)
    return True


def _together(spec: SearchSpec, home: Path, states: list[dict[str, Any]]) -> Search:
    """All islands as one."""
    cpu = torch.device("cpu")
    islands = [search_of(spec, home, cpu, number) for number in range(len(states))]
    for search, state in zip(islands, states, strict=True):
        search.restore(state["search"])
    islands[0].merge(islands[1:])
    return islands[0]


def _kept(population: list[Row], networks: list[Row]) -> dict[str, Row]:
    """Rows by candidate: the population, best first, then what else may be on a front; columns say which."""
    columns = {"in_population": False} | {f"on_front_{cost}": False for cost in COSTS}
    kept = {row["candidate"]: columns | row | {"in_population": True} for row in population}
    return kept | {row["candidate"]: columns | row for row in networks if row["candidate"] not in kept}


def _to_measure(best: Winner, networks: list[Row]) -> list[str]:
    """The winner, and where the search knows no latencies, some networks of the front by FLOPs."""
    known = any("latency_ms" in row for row in networks)
    others = [] if known else spread(front(networks, "flops"), MEASURED)
    return [*dict.fromkeys([best.structure, *(row["candidate"] for row in others)])]
