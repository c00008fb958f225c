"""How long the networks that a search found take, measured at its end where its candidates were.

By the conditions of the search's latency budget, so that the numbers compare: its batch size, precision and device,
unless that is a GPU and there is none. Without a budget as Zen-NAS and GENet measure, on the device at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workloads.explore import search_of
from workloads.record import RunFolder
from workloads.search.latency import device_name, measure
from workloads.search.latency_budget import LatencyBudget
from workloads.spec_search import SearchSpec

BATCH_SIZE = 64  # without a budget, as in Zen-NAS and GENet
MOST_MACS = 2e10  # of such a batch on a CPU, about a second: larger networks see fewer images at once


def conditions(budget: LatencyBudget | None, here: torch.device, flops: float) -> dict[str, Any]:
    """Device, batch size and precision of a measurement.

    Args:
        budget: of the search.
        here: the device at hand, beside which there is always a CPU.
        flops: of the largest network.
    """
    if budget is not None and budget.device in ("cpu", here.type):
        precision = budget.resolved_precision
        return {"device": torch.device(budget.device), "batch_size": budget.batch_size, "precision": precision}
    if here.type == "cuda":
        return {"device": here, "batch_size": BATCH_SIZE, "precision": "fp16"}
    return {"device": here, "batch_size": max(1, min(BATCH_SIZE, int(MOST_MACS / flops))), "precision": "fp32"}


def measured(
    anchor: nn.Module, spec: SearchSpec, run: RunFolder, home: Path, candidates: Sequence[str], size: int, flops: float
) -> list[dict[str, Any]]:
    """What `Place.scan` calls: milliseconds of an image, and how they were measured; fewer when the job was stopped.

    Args:
        anchor: says which device is at hand.
        spec: of the search.
        run: its folder.
        home: where references to weights are looked up.
        candidates: as `Search.build` takes them.
        size: side of the images.
        flops: of the largest.
    """
    here = next(anchor.parameters()).device
    search, found = search_of(spec, home, here), []
    how = conditions(search.config.budget.latency, here, flops)
    said = how | {"device": device_name(how["device"])}
    for candidate in candidates:
        if run.stop.exists():
            break
        with torch.device("meta"):
            network = search.build(candidate)
        found.append({"ms": measure(network, size=size, **how)} | said)
    return found
