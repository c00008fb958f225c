"""By which conditions a search measures what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.toy_search import toy_search
from workloads import found_latency
from workloads.found_latency import conditions
from workloads.record import RunFolder
from workloads.search.latency_budget import LatencyBudget
from workloads.search.zen_space import START

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("flops", "batch_size"), [(1.6e8, 64), (2e9, 10), (1.9e10, 1), (1e12, 1)])
def test_a_cpu_sees_fewer_images_at_once_the_larger_the_network(flops: float, batch_size: int) -> None:
    assert conditions(None, CPU, flops) == {"device": CPU, "batch_size": batch_size, "precision": "fp32"}


@pytest.mark.parametrize(
    ("budget", "here", "expected"),
    [
        ({"device": "cuda", "batch_size": 8, "precision": "fp32"}, CUDA, (CUDA, 8, "fp32")),
        ({"device": "cuda", "batch_size": 8, "table": "v100.json"}, CUDA, (CUDA, 8, "fp16")),
        ({"device": "cuda", "batch_size": 8, "table": "v100.json"}, CPU, (CPU, 20, "fp32")),
        ({"batch_size": 1}, CPU, (CPU, 1, "fp32")),
        ({"batch_size": 1}, CUDA, (CPU, 1, "fp32")),
        (None, CUDA, (CUDA, 64, "fp16")),
    ],
)
def test_the_budget_says_how_where_its_device_is_there(
    budget: dict[str, Any] | None, here: torch.device, expected: tuple[Any, ...]
) -> None:
    found = conditions(None if budget is None else LatencyBudget(ms=1, **budget), here, 1e9)
    assert (found["device"], found["batch_size"], found["precision"]) == expected


def test_a_network_is_measured_as_the_search_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []

    def measure(network: Any, **how: Any) -> float:
        assert all(p.is_meta for p in network.parameters())
        seen.append((network.num_classes, how))
        return 7.0

    monkeypatch.setattr(found_latency, "measure", measure)
    spec = toy_search({"budget": {"latency": {"ms": 9, "batch_size": 3}}})
    run = RunFolder(tmp_path)
    (found,) = found_latency.measured(nn.Linear(1, 1), spec, run, tmp_path, [START["cifar"]], 8, 1e9)
    assert found["ms"] == 7 and found["batch_size"] == 3 and found["device"].startswith("cpu, ")
    assert seen == [(10, {"size": 8, "device": CPU, "batch_size": 3, "precision": "fp32"})]
    run.stop.touch()
    assert found_latency.measured(nn.Linear(1, 1), spec, run, tmp_path, [START["cifar"]], 8, 1e9) == []
