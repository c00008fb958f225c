"""What networks of a BINAS space cost (arXiv 2110.12399): counted, measured, and by a latency table."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.toy_search import TOY_SPACE
from workloads.models.architecture import costs
from workloads.models.binas import Binas as Network
from workloads.models.binas_space import Space
from workloads.search import binas_costs
from workloads.search.base import SearchInputs
from workloads.search.binas import Binas, BinasConfig
from workloads.search.binas_costs import PartLatency, _Back, counted, key, latency, places, shape_of, table_of
from workloads.search.latency_budget import LatencyBudget
from workloads.search.latency_grid import grid
from workloads.search.latency_ops import operations
from workloads.search.latency_table import LatencyTable


def by_table(folder: Path, ms: float, kernels: tuple[int, ...] = (1, 3, 5)) -> BinasConfig:
    """A budget by the table of a GPU, of which the interpolation is exact."""
    of: dict[str, dict[str, float]] = {}
    for op in grid(16, 1, widths=[4, 32, 128], kernels=kernels):
        of.setdefault(op.family, {})[",".join(map(str, op.sizes))] = 1e-3 * math.prod(s**0.4 for s in op.sizes)
    file = folder / "table.json"
    LatencyTable(on="cuda", device="toy", torch="2", size=16, batch_size=1, precision="fp16", ms=of).write(file)
    budget = {"latency": {"ms": ms, "device": "cuda", "batch_size": 1, "table": str(file)}}
    return BinasConfig.model_validate({"space": TOY_SPACE, "image_size": 16, "classes": 4, "budget": budget})


def test_costs_of_every_network_of_a_small_space() -> None:
    space = Space.model_validate(TOY_SPACE)
    forms, shape = counted(space, 16, 4), shape_of(space)
    rng = np.random.default_rng(0)
    for network in rng.integers(shape.choices, size=(40, len(shape.choices))):
        architecture = space.architecture(network[:4].reshape(2, 2).tolist(), network[4:].tolist())
        expected = costs(architecture, stem=8, features=12, classes=4, size=16)
        point = shape.one_hot(network)
        assert forms["parameters"](*point) == expected.parameters and forms["flops"](*point) == expected.flops
        assert forms["layers"](*point) == len(architecture[1]) + len(architecture[2])


def test_latency_is_the_sum_of_the_table() -> None:
    space, sizes = Space.model_validate(TOY_SPACE), []

    def ms(part: Any, shape: tuple[int, int, int]) -> float:
        sizes.append(shape)
        return float(sum(p.numel() for p in part.parameters())) / 1000

    table = table_of(space, 16, 4, ms)
    assert sizes[:3] == [(3, 16, 16), (16, 4, 4), (8, 8, 8)]
    # 4 configurations: two stages, whose first block differs from the second only where it changes channels or size
    assert len(table) == 1 + 4 * (1 + 2)
    form, shape = latency(space, 16, table), shape_of(space)
    network = np.array([0, 3, 2, 1, 1, 0])
    architecture = space.architecture([[0, 3], [2, 1]], [1, 0])
    blocks = [place for row in places(space, 16) for place in row]
    looked_up = [
        table[next(key(b, w, s) for b, w, s in blocks if str(b) == str(block) and (b, w, s) in places(space, 16)[c])]
        for c, block in ((0, architecture[1][0]), (3, architecture[1][1]), (2, architecture[2][0]))
    ]
    assert float(form(*shape.one_hot(network))) == pytest.approx(table["rest"] + sum(looked_up))
    assert len({k.split(" of ")[1] for k in table if k != "rest"}) == 3 - 1  # places: 8 x 8 x 8 and 16 x 4 x 4


def test_latency_is_measured_on_maps_of_that_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def timed(calls: Any, device: torch.device) -> list[float]:
        seen.append(tuple(calls[0]().shape))
        return [6.0]

    monkeypatch.setattr(binas_costs, "timed", timed)
    with torch.device("meta"):
        part = torch.nn.Conv2d(8, 32, 3, padding=1)
    assert PartLatency(LatencyBudget(ms=5, batch_size=2), 16)(part, (8, 16, 16)) == 3.0  # of one image
    assert seen == [(2, 32, 16, 16)]


def test_by_a_table_a_network_takes_what_its_parts_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binas_costs, "timed", None)  # nothing is measured
    config = by_table(tmp_path, ms=1.0)
    table = config.looked_up()
    assert table is not None and config.budget.latency is not None
    parts = config.budget.latency.read_table(16)
    assert parts is not None
    form, shape = latency(config.space, 16, table), shape_of(config.space)
    for network in np.random.default_rng(0).integers(shape.choices, size=(10, len(shape.choices))):
        architecture = config.space.architecture(network[:4].reshape(2, 2).tolist(), network[4:].tolist())
        with torch.device("meta"):
            whole = Network(architecture, stem=8, features=12, num_classes=4)
            in_a_row = torch.nn.Sequential(
                whole.conv_stem, whole.bn1, whole.act, whole.blocks, _Back(torch.nn.Identity(), whole)
            )  # so that the first BatchNorm is folded too
        assert form(*shape.one_hot(network)) == pytest.approx(parts.predict(operations(in_a_row, 16)))


def test_a_search_by_a_table_is_within_it(tmp_path: Path) -> None:
    """And asks for no measurement of it."""
    config = by_table(tmp_path, ms=0.27)
    assert config.problems("cpu") == []
    search = Binas(config, SearchInputs())
    random = np.random.default_rng(0)
    for index in range(search.total):
        search.tell(index, search.ask(index), {"score": float(random.uniform(60, 70))})
    network, problem = search.solve()
    everything = np.array(list(itertools.product(*map(range, search.shape.choices))))
    ms = problem.costs["latency_ms"](*search.shape.one_hot(everything))
    assert 0 < (ms <= 0.27).sum() < len(ms)
    assert problem.costs["latency_ms"](*search.shape.one_hot(network)) <= 0.27
    assert problem.value(network) == pytest.approx(problem.value(everything)[ms <= 0.27].max())


def test_a_table_that_does_not_do_is_told_before_the_search(tmp_path: Path) -> None:
    [(where, said)] = by_table(tmp_path, ms=0.01).problems("cpu")
    assert where == ("budget", "latency", "ms") and "got latency_ms: 0.01" in said and "expected at least" in said
    [(where, said)] = by_table(tmp_path, ms=1.0, kernels=(1, 3)).problems("cpu")
    assert where == ("budget", "latency") and "'depthwise 5x5 stride 1 at 8'" in said and "--kernel" in said
