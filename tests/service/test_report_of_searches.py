"""Real small searches, each to its artifact and its report: both charts have points, a front and the winner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from service.report_search import COSTS, against, search_page
from tests.toy_search import TOY_SEARCH
from workloads import found_latency
from workloads.models.binas_space import Space
from workloads.models.binas_supernet import BinasSupernet
from workloads.models.genet import Block, GENet
from workloads.record import RunFolder
from workloads.run import STOPPED, SUCCEEDED, execute
from workloads.spec_search import SearchSpec
from workloads.winner import Found, read_found

SPACE = {
    "stem": 8, "first": 8, "widths": [8, 16], "strides": [1, 2], "relu_stages": 1, "min_depth": 1, "max_depth": 2,
    "expansions": [2, 3], "kernels": [3, 5], "se": [False], "last": 16, "features": 12,
}  # fmt: skip
BLOCKS = [["XX", 16, 1, 2, 3], ["DW", 16, 1, 2, 3]]
SEARCHES: dict[str, dict[str, Any]] = {
    "zen_nas": TOY_SEARCH | {"iterations": 60},
    "mae_det": {"image_size": 32, "iterations": 40, "population": 8, "budget": {"layers": 40}},
    "genet": {
        "master": {"name": "genet", "image_size": 16, "stem": 8, "blocks": BLOCKS, "last": 24},
        "choices": {"kinds": ["XX", "DW"], "kernels": [3], "depths": [0], "widths": [1.0, 1.5]},
        "steps": 1, "batch_size": 8, "budget": {"latency": {"ms": 1e3, "batch_size": 2}},
    },
    "binas": {"space": SPACE, "image_size": 16, "classes": 4, "passes": 1, "budget": {"flops": 300_000}},
}  # fmt: skip


def supernet() -> nn.Module:
    """A fresh one whose BatchNorms have seen something: it knows no labels, and takes no class for all."""
    network, images = BinasSupernet(Space.model_validate(SPACE), 4), torch.randn(64, 3, 16, 16)
    for _ in range(30):
        network(images, network.space.random_paths(torch.randint(2**40, (64,))))
    with torch.no_grad():
        network.classifier.bias -= network.eval()(images).mean(dim=0)  # type: ignore[operator]
    return network


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "genet": lambda: GENet(8, [Block(*block) for block in BLOCKS], 24, num_classes=4),  # type: ignore[arg-type]
    "binas": supernet,
}


@pytest.fixture
def searched(tmp_path: Path, toy_shards: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFolder]:
    """Runs one of them where a network takes as many ms as it has parameters."""

    def takes(network: nn.Module, **_: Any) -> float:
        return float(sum(p.numel() for p in network.parameters()))

    monkeypatch.setattr("workloads.found_latency.measure", takes)
    monkeypatch.setattr("workloads.search.latency_budget.measure_all", lambda of, **_: [1e-4 * takes(n) for n in of])

    def run(name: str, ends: int = SUCCEEDED, **config: Any) -> RunFolder:
        streams = {"genet": {"train": "train", "val": "test"}, "binas": {"validation": "test"}}.get(name, {})
        fields: dict[str, Any] = {"data": {stream: {"shards": toy_shards[of]} for stream, of in streams.items()}}
        if name in WEIGHTS:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                save_file(WEIGHTS[name]().state_dict(), tmp_path / "w.safetensors")
            fields["init"] = str(tmp_path / "w.safetensors")
        spec = SearchSpec.model_validate({"name": name, "search": SEARCHES[name] | config | {"name": name}, **fields})
        folder = RunFolder(tmp_path / "runs" / name)
        assert execute(spec, folder, tmp_path, job_id=name) == ends
        return folder

    return run


def drawn(run: RunFolder) -> tuple[Found, list[dict[str, Any]]]:
    found = read_found(run.artifact)
    assert found is not None
    return found, pq.read_table(run.artifact / "population.parquet").to_pylist()


@pytest.mark.parametrize("name", SEARCHES)
def test_both_charts_have_points_a_front_and_the_winner(name: str, searched: Callable[..., RunFolder]) -> None:
    run = searched(name)
    found, rows = drawn(run)
    job = {"id": name, "name": name, "state": "SUCCEEDED", "reason": None, "hint": None, "created_at": "2026-11-21",
           "spec": {"name": name}, "evaluations": []}  # fmt: skip
    text = search_page(job=job, points=list(run.read_metrics()), paper=found.paper, artifact=run.artifact)
    for cost, what in COSTS.items():
        assert f"<h2>Score against {what}</h2>" in text
        kept, front, winner = against(rows, cost, what, found).data
        assert len(kept.x) >= len(front.x) >= 2 and len(winner.x) == 1
        assert list(front.x) == sorted(front.x) and list(front.y) == sorted(set(front.y))
        assert not any(x <= fx and y > fy for x, y in zip(winner.x, winner.y, strict=True)
                       for fx, fy in zip(front.x, front.y, strict=True))  # fmt: skip


def test_a_winner_shows_that_its_budget_was_met(searched: Callable[..., RunFolder]) -> None:
    """The latency that its search held it to is among its costs; beside it what was measured at the end, likewise."""
    budget = {"latency": {"ms": 10, "batch_size": 3}, "parameters": 200_000}
    found, rows = drawn(searched("zen_nas", budget=budget, iterations=30))
    assert found.latency is not None and found.latency.batch_size == 3
    assert found.costs["latency_ms"] == pytest.approx(1e-4 * found.latency.ms) and found.costs["latency_ms"] <= 10
    assert all(row["latency_ms"] <= 10 for row in rows)


def test_stopped_while_it_measures_it_leaves_nothing_and_goes_on(
    searched: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[nn.Module] = []

    def stops(network: nn.Module, **_: Any) -> float:
        measured.append(network)
        RunFolder(tmp_path / "runs" / "mae_det").stop.touch()
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(found_latency, "measure", stops)
        run = searched("mae_det", ends=STOPPED)
    assert len(measured) == 1 and not run.artifact.exists()
    run.stop.unlink()
    assert read_found(searched("mae_det").artifact) is not None
