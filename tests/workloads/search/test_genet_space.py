"""What may stand in a block's place, and what networks cost without being built (GENet, arXiv 2006.14090)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from workloads.models.genet import Block, GENetConfig, GENetLarge, GENetLight, GENetNormal
from workloads.search.genet_space import Choices, GENetLLRConfig, branches, costs, parse, replaced, text
from workloads.search.latency_grid import grid
from workloads.search.latency_ops import of_branches, operations
from workloads.search.latency_table import LatencyTable

BUDGET = {"latency": {"ms": 1.0}}
TINY = {"name": "genet", "image_size": 16, "stem": 8, "blocks": [["XX", 8, 1, 2], ["BL", 48, 2, 2]], "last": 24}


@pytest.mark.parametrize(
    ("network", "parameters", "multiply_adds"),
    [
        (GENetLight(), 8_173_761, 547_222_656),
        (GENetNormal(), 21_142_920, 2_208_073_216),
        (GENetLarge(), 31_078_280, 4_557_041_664),
    ],
)
def test_published_costs(network: GENetConfig, parameters: int, multiply_adds: int) -> None:
    found = costs(network)
    assert found["parameters"] + 1000 * (network.last + 1) == parameters
    assert found["flops"] + 1000 * network.last == multiply_adds
    with torch.device("meta"):
        built = network.build()
    assert operations(built, 192) == Counter(of_branches(branches(network), 192))


def test_every_combination_but_the_block_itself() -> None:
    found = Choices().instead_of(Block("BL", 640, 6, 2))
    assert len(found) == len(set(found)) == 3 * 2 * 3 * 3 - 1
    assert {block.channels for block in found} == {480, 640, 800} and {block.layers for block in found} == {5, 6, 7}
    assert all(block.stride == 2 for block in found) and Block("BL", 640, 6, 2, 3) not in found
    assert {block.layers for block in Choices().instead_of(Block("DW", 640, 1, 1))} == {1, 2}
    assert {block.channels for block in Choices(widths=(1.0,)).instead_of(Block("XX", 13, 1, 2))} == {13}


def test_more_candidates_than_a_search_ends_with_are_refused() -> None:
    many = {"depths": [*range(16)], "widths": [n / 4 for n in range(4, 20)]}
    master = {**TINY, "blocks": [["XX", 100, 1, 2]] * 7}
    with pytest.raises(ValidationError, match="got choices of 10,745 candidates, expected at most 10,000; allow fewer"):
        GENetLLRConfig.model_validate({"master": master, "budget": BUDGET, "choices": many})


def test_candidates_are_networks_that_can_be_read() -> None:
    """A structure has at most so many layers and channels."""
    largest = Choices(depths=(1,), widths=(1.0, 8.0)).instead_of(Block("XX", 50_000, 998, 1))
    assert {(block.layers, block.channels) for block in largest} == {(999, 50_000)}
    assert Choices(depths=(1,)).instead_of(Block("XX", 8, 999, 1)) == []


def test_a_network_is_one_line() -> None:
    other = replaced(GENetLight(), {1: Block("DW", 64, 2, 2, 5)})
    assert text(other).startswith('{"stem": 13, "blocks": [["XX", 48, 1, 2, 3], ["DW", 64, 2, 2, 5], ')
    assert parse(text(other), GENetLight()).model_dump() == other.model_dump()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"master": {"name": "vit_tiny"}}, "got another network, expected a GENet"),
        (
            {"master": {"name": "genet_normal", "image_size": [64, 32]}},
            r"got image_size=\[64, 32\], expected one number",
        ),
        ({"choices": {"kinds": ["XX"], "kernels": [3], "depths": [0], "widths": [1]}}, "expected others; allow more"),
        ({"choices": {"depths": [10**9]}}, "less than 999"),
        ({"choices": {"depths": [*range(17)]}}, "at most 16 items"),
        ({"choices": {"widths": [float("nan")]}}, "finite number"),
        ({"choices": {"kernels": [7]}}, "Input should be 3 or 5"),
        (
            {"budget": {"parameters": 5, "layers": 9}},
            "got parameters, layers in a budget of genet, expected latency alone",
        ),
        ({"budget": {"flop": 5}}, "Extra inputs"),
        ({"budget": {}}, "Field required"),
    ],
)
def test_wrong_configs(change: dict[str, Any], says: str) -> None:
    only = {**TINY, "blocks": [["XX", 8, 1, 2]]}
    with pytest.raises(ValidationError, match=says):
        GENetLLRConfig.model_validate({"master": only, "budget": BUDGET} | change)


def test_a_budget_that_no_combination_meets_is_refused_where_a_table_tells(tmp_path: Path) -> None:
    ms: dict[str, dict[str, float]] = {}
    for op in grid(16, 64, widths=[1, 8, 64, 256], kernels=[1, 3]):
        ms.setdefault(op.family, {})[",".join(map(str, op.sizes))] = 0.01 * (1 + len(ms))
    file = tmp_path / "gpu.json"
    LatencyTable(on="cuda", device="H100", torch="2", size=16, batch_size=64, precision="fp16", ms=ms).write(file)

    def config(ms: float, kernels: tuple[int, ...] = (3,)) -> GENetLLRConfig:
        budget = {"latency": {"ms": ms, "device": "cuda", "table": str(file)}}
        return GENetLLRConfig.model_validate({"master": TINY, "budget": budget, "choices": {"kernels": kernels}})

    ((where, said),) = config(0.001).problems("cpu")
    assert where == ("budget", "latency", "ms") and said.startswith("got 0.001, expected at least ")
    least = float(said.split("at least ")[1].split(";")[0])
    assert config(1.001 * least).problems("cpu") == [] != config(0.999 * least).problems("cpu")
    assert config(1.0).least() == {"latency_ms": pytest.approx(least, rel=1e-3)}
    ((where, said),) = config(1.0, kernels=(5,)).problems("cpu")
    assert where == ("budget", "latency", "table") and "conv 5x5 stride" in said
    without = GENetLLRConfig.model_validate({"master": TINY, "budget": {"latency": {"ms": 1, "device": "cuda"}}})
    assert "name its file in table" in without.problems("cpu")[0][1] and without.problems("cuda") == []
    assert without.least() == {}


def test_the_grid_of_a_table_covers_what_is_asked_of_published_networks() -> None:
    ms: dict[str, dict[str, float]] = {}
    for op in grid(192, 64):
        ms.setdefault(op.family, {})[",".join(map(str, op.sizes))] = 1.0
    table = LatencyTable(on="cuda", device="H100", torch="2", size=192, batch_size=64, precision="fp16", ms=ms)
    for name in ("genet_light", "genet_normal", "genet_large"):
        config = GENetLLRConfig.model_validate({"master": {"name": name, "image_size": 192}, "budget": BUDGET})
        for _, network in config.replacements:
            parts = list(of_branches(branches(network), 192, 1000))
            assert table.predict(parts) == pytest.approx(len(parts))
