"""The entropy of MAE-DET by the numbers of the released code, and the search for it (arXiv 2111.13336)."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from tests.toy_search import in_any_order
from workloads import catalog
from workloads.models.encoders import build_encoder
from workloads.models.maedet import MAEDet, published
from workloads.models.maedet_structure import Structure, layers, parse, plain, text
from workloads.search.base import SearchInputs
from workloads.search.island import Island
from workloads.search.latency_budget import LatencyBudget, NetworkLatency
from workloads.search.latency_grid import grid
from workloads.search.latency_ops import of_branches, operations
from workloads.search.latency_table import LatencyTable
from workloads.search.mae_det import MAEDET, MAEDETConfig, entropy_score, latency_ms, stage_entropies
from workloads.search.mae_det_space import START
from workloads.spec import Named

DETECTION = (0, 0, 1, 1, 6)
BUDGET = {"flops": 18_800_000_000, "layers": 91}
R50 = START["k1kxk1"]
TINY: dict[str, Any] = {"population": 12, "iterations": 120, "budget": {"parameters": 12_000_000, "layers": 40}}


def search(**more: Any) -> MAEDET:
    return MAEDET(MAEDETConfig(**{**TINY, **more}), SearchInputs(seed=3))


@pytest.mark.parametrize(
    ("structure", "score", "terms"),
    [
        (published()["S"], 1731.907010, (54.961256, 150.196096, 1526.749658)),
        (published()["M"], 2114.782868, (112.201668, 213.048462, 1789.532737)),
        (published()["L"], 2599.396120, None),
        (R50, 400.726108, (23.599838, 44.021621, 333.104649)),
    ],
    ids=["S", "M", "L", "R50"],
)
def test_scores_of_the_released_code(structure: Structure, score: float, terms: tuple[float, ...] | None) -> None:
    assert entropy_score(structure, DETECTION) == pytest.approx(score, abs=1e-6)
    found = [a * H for a, H in zip(DETECTION, stage_entropies(structure), strict=True)][2:]
    assert terms is None or found == pytest.approx(terms, abs=1e-6)
    assert entropy_score(structure, (0, 0, 0, 0, 1)) == pytest.approx(found[2] / 6)


def test_the_first_layers() -> None:
    """Of the stem 1.647918, of the first of the body 6.808042; H of a stage adds the logarithm of its channels."""
    found = stage_entropies(published()["S"])
    assert found[0] - math.log(32) == pytest.approx(1.647918, abs=1e-6)
    first = parse([*plain(published()["S"])[:1], plain(published()["S"])[1] | {"L": 1}])
    assert stage_entropies(first)[1] - math.log(48) - 1.647918 == pytest.approx(6.808042, abs=2e-6)


def test_a_chain_of_k1kx() -> None:
    blocks: list[dict[str, Any]] = [{"class": "ConvKXBNRELU", "in": 3, "out": 32, "s": 2, "k": 3}]
    for width, inner, depth in ((48, 32, 1), (96, 48, 2), (192, 96, 1), (384, 192, 1)):
        block = {"class": "ResK1KX", "in": blocks[-1]["out"], "out": width, "s": 2, "k": 3, "L": depth, "btn": inner}
        blocks.append(block)
    chain = parse(blocks)
    assert entropy_score(chain, DETECTION) == pytest.approx(255.290803, abs=1e-6)
    assert layers(chain) == 11


@given(st.sampled_from(sorted(START)), st.integers(1, 5), st.sampled_from(["L", "btn", "k"]))
def test_more_of_a_block_raises_its_stage_and_those_behind(start: str, at: int, key: str) -> None:
    blocks = plain(START[start])
    more = [*blocks]
    more[at] = blocks[at] | {key: blocks[at][key] + 2}
    before, after = stage_entropies(START[start]), stage_entropies(parse(more))
    stage = (1, 2, 3, 3, 4)[at - 1]
    assert after[:stage] == before[:stage]
    gains = [b - a for a, b in zip(before[stage:], after[stage:], strict=True)]
    assert all(gain == pytest.approx(gains[0]) and gain > 0 for gain in gains)


def test_a_layer_more_at_the_end_raises_the_last_term_by_six_times_its_h() -> None:
    blocks = plain(R50)
    deeper = parse([*blocks[:-1], blocks[-1] | {"L": 2}])
    h = (math.log(2048) + math.log(512 * 9) + math.log(512)) / 2
    assert entropy_score(deeper, DETECTION) - entropy_score(R50, DETECTION) == pytest.approx(6 * h)
    assert stage_entropies(deeper)[:4] == stage_entropies(R50)[:4]


def test_it_is_the_logarithm_of_the_deviation_of_the_maps() -> None:
    """Measured: weights and images from N(0, 1), circular borders, no BatchNorm, ReLU or shortcut."""
    generator = torch.Generator().manual_seed(0)
    structure = parse([*plain(R50)[:1], {"class": "ResK1KXK1", "in": 32, "out": 64, "s": 2, "k": 5, "L": 3, "btn": 24}])
    x = torch.randn(4, 3, 32, 32, generator=generator)
    for block in structure:
        for branch, count in block.parts():
            for conv in branch.convs * count:
                weight = torch.randn(conv.width, conv.width_in, conv.kernel, conv.kernel, generator=generator)
                border = nn.functional.pad(x, [conv.kernel // 2] * 4, mode="circular")
                x = nn.functional.conv2d(border, weight, stride=conv.stride)
    h = stage_entropies(structure)[-1] - math.log(64)
    assert h == pytest.approx(21.902, abs=1e-3)
    assert float(x.double().std().log()) == pytest.approx(h, abs=0.1)


def run(island: Island, seed: int = 0) -> list[dict[str, Any]]:
    return in_any_order(island, seed).population()


@pytest.mark.parametrize("seed", [0, 1])
def test_two_thousand_candidates_beat_the_start_by_half(seed: int) -> None:
    """Three times its score, in fact: 1323 and 1263 of 401."""
    config = MAEDETConfig(iterations=2000, budget=BUDGET)  # type: ignore[arg-type]
    island = Island(MAEDET(config, SearchInputs(seed=seed)))
    population = run(island)
    assert population[0]["score"] > 1.5 * entropy_score(R50, DETECTION)
    assert len({row["candidate"] for row in population}) == len(population) == 256
    for row in population:
        assert row["flops"] <= 18.8e9 and row["layers"] <= 91
        structure = parse(row["candidate"])
        assert row["score"] == entropy_score(structure, DETECTION)
        assert {name: row[name] for name in ("parameters", "flops", "layers")} == config.costs(structure)
    assert island.scored + island.spent == 2000


def test_one_seed_gives_one_population_whatever_the_order() -> None:
    first, second = (run(Island(search()), seed) for seed in (1, 2))
    assert first == second
    assert len(first) == 12
    assert first != run(Island(MAEDET(MAEDETConfig(**TINY), SearchInputs(seed=4))))


def test_goes_on_from_its_state_as_if_it_had_not_been_away() -> None:
    whole, cut = Island(search()), Island(search())
    while cut.told < 40:
        taken = cut.take(4)
        cut.give({index: cut.search.score(candidate, index) for index, candidate in taken})
    assert cut.take(3)  # never given back
    again = Island(search())
    again.restore(json.loads(json.dumps(cut.state())))
    assert run(again) == run(whole)
    assert (again.told, again.scored, again.spent) == (whole.told, whole.scored, whole.spent)
    assert again.search.winner() == whole.search.winner()


def test_starts_with_the_start_or_with_the_smallest() -> None:
    assert search().ask(0) == text(R50)
    small = search(budget={"parameters": 20_000, "layers": 40})
    first = small.ask(0)
    assert first is not None and {block.width for block in parse(first)} == {8}
    rows = run(Island(small))
    assert rows[0]["score"] > 1.5 * entropy_score(parse(first), DETECTION)
    assert all(row["parameters"] <= 20_000 for row in rows)


def test_members_of_other_islands_are_taken_in() -> None:
    here, there = search(), MAEDET(MAEDETConfig(**TINY), SearchInputs(seed=3, island=1))
    run(Island(here))
    others = run(Island(there))
    best = max(here.population()[0], others[0], key=lambda row: row["score"])
    for row in others:
        here.immigrate(row)
    assert here.population()[0] == best and len(here.population()) == 12


def test_the_winner_is_a_backbone() -> None:
    found = search(image_size=64)
    run(Island(found))
    winner = found.winner()
    structure = parse(winner.structure)
    assert winner.score == found.population()[0]["score"] == entropy_score(structure, DETECTION)
    assert winner.model == {"name": "maedet", "structure": plain(structure), "image_size": 64}
    with torch.device("meta"):
        network: Any = build_encoder(Named.model_validate(json.loads(json.dumps(winner.model))))
        maps = network.pyramid(torch.empty(1, 3, 64, 64))
    assert [x.shape[1:] for x in maps] == [(C, s, s) for C, s in zip(network.channels[2:], (8, 4, 2), strict=True)]
    assert sum(p.numel() for p in network.parameters()) == winner.costs["parameters"]
    assert [block["size"] for block in winner.blocks] == [32, 16, 8, 4, 4, 2]
    assert [block["channels"] for block in winner.blocks] == [block.width for block in structure]
    assert winner.blocks[0]["label"] == "ConvK3" and winner.blocks[1]["label"] in ("ResK1K3K1", "ResK1K5K1")


def table(size: int, batch_size: int) -> LatencyTable:
    """Of a device whose parts take 1 ns a channel."""
    ms: dict[str, dict[str, float]] = {}
    for op in grid(size, batch_size, widths=[8, 64, 2048], kernels=[1, 3, 5], most_macs=1e12):
        ms.setdefault(op.family, {})[",".join(map(str, op.sizes))] = 1e-6 * op.sizes[-1]
    conditions: dict[str, Any] = {"on": "cuda", "device": "made up", "torch": "2", "precision": "fp16"}
    return LatencyTable(size=size, batch_size=batch_size, ms=ms, **conditions)


@pytest.mark.parametrize("name", ["k1kxk1", "k1kx", "S"])
def test_a_structure_and_its_network_have_the_same_parts(name: str) -> None:
    structure = (START | published())[name]
    with torch.device("meta"):
        network = MAEDet(structure)
    latency = NetworkLatency(LatencyBudget(ms=1), 65)
    latency.table = table(65, 1)
    assert latency_ms(latency, structure) == pytest.approx(latency(network))
    branches = [branch for block in structure for branch, count in block.parts() for _ in range(count)]
    assert Counter(of_branches(branches, 65, pools=True)) == operations(network, 65)


def test_a_latency_budget_by_a_table(tmp_path: Path) -> None:
    """For a GPU that is not there. The start takes .63 ms by that table: the way in is the smallest network."""
    table(64, 1).write(tmp_path / "gpu.json")
    latency = {"ms": 0.05, "device": "cuda", "batch_size": 1, "table": str(tmp_path / "gpu.json")}
    config = MAEDETConfig(**{**TINY, "image_size": 64, "budget": {"layers": 40, "latency": latency}})
    assert config.problems("cpu") == []
    found = MAEDET(config, SearchInputs(seed=3))
    assert [found.ask(0), found.ask(1)] == [text(R50), text(config.space.smallest(R50))]
    rows = run(Island(MAEDET(config, SearchInputs(seed=3))))
    assert all(row["latency_ms"] <= 0.05 for row in rows)
    assert rows[0]["score"] > 1.5 * entropy_score(config.space.smallest(R50), DETECTION)


def test_a_latency_that_no_network_has_or_that_the_table_does_not_say(tmp_path: Path) -> None:
    full = table(64, 1)
    full.write(tmp_path / "gpu.json")
    latency = {"ms": 1e-4, "device": "cuda", "batch_size": 1, "table": str(tmp_path / "gpu.json")}
    config = MAEDETConfig(**{**TINY, "image_size": 64, "budget": {"layers": 40, "latency": latency}})
    ((where, said),) = config.problems("cpu")
    assert where == ("budget", "latency", "ms") and said.startswith("got 0.0001 ms, expected at least 0.03882")
    del full.ms["conv 3x3 stride 2 at 64"]
    full.write(tmp_path / "gpu.json")
    ((where, said),) = config.problems("cpu")
    assert where == ("budget", "latency", "table") and "got a network with 'conv 3x3 stride 2 at 64'" in said


def test_without_a_table_the_backbone_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr("workloads.search.latency_budget.measure_all", lambda of, **_: seen.extend(of) or [7.0])
    found = search(budget={"layers": 40, "latency": {"ms": 5}})
    assert found.score(text(R50), 0) == {"latency_ms": 7.0}
    assert isinstance(seen[0], MAEDet)


def test_impossible_budgets_are_told_with_what_is_possible() -> None:
    assert catalog.load("search", "mae_det") is MAEDET
    config = MAEDETConfig(**{**TINY, "budget": {"parameters": 100, "layers": 12}})
    (where, said), (_, about_layers) = config.problems("cpu")
    least = int(config.least()["parameters"])
    assert where == ("budget", "parameters")
    assert said == f"got 100, expected at least {least:,}, which the smallest network has; allow as much"
    assert "got 12, expected at least 16" in about_layers
    assert MAEDETConfig(**{**TINY, "budget": {"parameters": least, "layers": 16}}).problems("cpu") == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"initial": "k1k"}, "got 'k1k', expected a list of blocks or one of k1kxk1, k1kx"),
        ({"initial": [{"class": "ConvKXBNRELU", "in": 3, "out": 8, "s": 2, "k": 4}]}, "in block 1, k: got 4"),
        (
            {"initial": [{"class": "ConvKXBNRELU", "in": 3, "out": 10**9, "s": 2, "k": 3}]},
            "less than or equal to 99999",
        ),
        ({"max_width": 10**9}, "less than or equal to 99999"),
        ({"stage_weights": [0, 0, 1, 1, float("inf")]}, "finite number"),
        ({"stage_weights": [1, 6]}, r"got stage_weights \[1.0, 6.0\] for a structure of 5 stages, expected a weight"),
        ({"stage_weights": [0, 0, 0, 0, 0]}, "expected a weight for each, not all 0"),
        ({"stage_weights": [0, 0, 0, 0, -1]}, "greater than or equal to 0"),
        ({"budget": {"flops": 10**9}}, "got a budget without layers, expected a bound: each layer raises the score"),
        ({"initial": "k1kx", "width_ranges": [None, [8, 16]]}, "got 2 width_ranges for 6 blocks, expected one each"),
        ({"width_ranges": [None, [8, 16], *[None] * 4]}, r"got width_ranges \[8, 16\] for block 2, ResK1KXK1, expec"),
        ({"initial": "k1kx", "width_ranges": [None, [16, 8], *[None] * 4]}, r"expected \[least, most\]"),
        ({"populaton": 3}, "Extra inputs"),
    ],
)
def test_wrong_configs(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        MAEDETConfig(**{**TINY, **change})


def test_the_smallest_network_is_measured_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(budget={"layers": 40, "latency": {"ms": 5}})
    asked = [found.ask(index) for index in range(3)]
    assert asked[:2] == [text(found.config.space.smallest(R50)), text(R50)]
    monkeypatch.setattr("workloads.search.mae_det.latency_ms", lambda *_: 7.0)
    with pytest.raises(
        ValueError, match=r"got latency: 5 ms, expected more than 7, which the fastest of the 1 smallest"
    ):
        found.tell(0, str(asked[0]), found.score(str(asked[0]), 0))
