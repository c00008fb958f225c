"""The spaces of Zen-NAS by the numbers of the released code, and the search on them (arXiv 2102.01063)."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.toy_search import in_any_order
from workloads.models.structure import layers, parse, text
from workloads.search.base import SearchInputs
from workloads.search.island import Island
from workloads.search.pareto import front
from workloads.search.zen_nas import ZenNAS, ZenNASConfig
from workloads.search.zen_space import RELEASED, START, TYPES, choices, frozen, mutate, smallest, split, widths

TINY: dict[str, Any] = {
    "initial": "cifar", "image_size": 8, "classes": 10, "batch_size": 2, "population": 12, "iterations": 90,
    "budget": {"parameters": 300_000, "layers": 12},
}  # fmt: skip


def search(**more: Any) -> ZenNAS:
    return ZenNAS(ZenNASConfig(**{**TINY, **more}), SearchInputs(seed=3))


def test_neighbours_of_a_part() -> None:
    """180 of K3K3(8,16,1,8,1) and 630 of K3K3(16,32,2,16,1), by the released lists with what is double left out."""
    found = [len(list(itertools.product(*choices(part, "server")))) for part in parse(START["cifar"])]
    assert found[1:3] == [180, 630]
    assert widths(16, "server") == [40, 32, 24, 16, 8]
    assert widths(2048, "server") == [2048, 1640, 1368, 1024, 816]
    assert widths(2048, "mobile")[0] == 5120


def test_narrow_parts_may_stay_and_are_not_frozen() -> None:
    assert (widths(4, "server"), widths(5, "server")) == ([8, 4], [16, 8, 5])
    stem, body, tail = parse("SuperConvK3BNRELU(3,4,1,1)SuperResIDWE1K3(4,4,2,4,3)SuperConvK1BNRELU(4,2048,1,1)")
    assert [frozen(part, "mobile") for part in (stem, body, tail)] == [False, False, True]
    assert not frozen(tail, "server")
    own, *others = smallest((stem, body, tail), "mobile")
    assert text(own) == "SuperConvK3BNRELU(3,4,1,1)SuperResIDWE1K3(4,4,2,4,1)SuperConvK1BNRELU(4,2048,1,1)"
    assert len(others) == len(TYPES["mobile"]) - 1, "its own type is there once"
    wide = parse("SuperConvK3BNRELU(3,99999,1,1)")
    assert int(max(widths(wide[0].width, "mobile"))) <= 65536, "what is drawn can be read"


def test_long_parts_are_split() -> None:
    parts = split(parse("SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,7)"))
    assert text(parts[1:]) == "SuperResK3K3(8,16,2,8,3)SuperResK3K3(16,16,1,8,4)"


@given(st.integers(0, 2**32), st.sampled_from(sorted(START)))
def test_mutations_are_structures_of_their_space(seed: int, start: str) -> None:
    space, generator = "mobile" if "mobile" in start else "server", np.random.default_rng(seed)
    structure = parse(START[start])
    strides = [part.stride for part in structure if part.stride > 1]
    for _ in range(5):
        structure = mutate(structure, 2, space, generator)  # type: ignore[arg-type]
        assert parse(text(structure)) == structure
    assert [part.stride for part in structure if part.stride > 1] == strides
    started = {part.type for part in parse(START[start])}
    assert {part.type for part in structure if part.bottleneck} <= {*TYPES[space], *started}  # type: ignore[index]
    if space == "mobile":
        assert structure[-1].width == 2048


def test_all_types_are_equally_likely() -> None:
    structure, generator = parse(START["cifar"])[:2], np.random.default_rng(0)
    drawn = [mutate(structure, 1, "server", generator)[1].type for _ in range(3600)]
    counts = [drawn.count(name) for name in TYPES["server"][1:]]  # the first is also what was not drawn
    assert min(counts) > 0.8 * 300 and max(counts) < 1.2 * 300


def test_types_are_drawn_as_by_the_released_code_if_one_asks_for_it() -> None:
    """Kernels of 3, 5 and 7 as 3 : 3 : 2; of the mobile types as 12 : 12 : 11 : ... : 2."""
    assert [Counter(RELEASED["server"])[f"SuperResK{k}K{k}"] for k in (3, 5, 7)] == [3, 3, 2]
    assert [Counter(RELEASED["server"])[f"SuperResK1K{k}K1"] for k in (3, 5, 7)] == [3, 3, 2]
    assert list(Counter(RELEASED["mobile"]).items())[1:4] == [
        ("SuperResIDWE2K3", 12), ("SuperResIDWE4K3", 11), ("SuperResIDWE6K3", 10)
    ]  # fmt: skip
    assert [Counter(RELEASED["mobile"])[f"SuperResIDWE{e}K{k}"] for e, k in ((1, 3), (6, 7))] == [12, 2]
    random, released = np.random.default_rng(0), search(types="released")
    drawn = Counter(parse(released.child(START["cifar"], random))[1].type for _ in range(3000))
    expected = 3000 * (1 - (5 / 6) ** 2) / 16  # of two draws of six parts one is this
    assert drawn["SuperResK7K7"] == pytest.approx(2 * expected, rel=0.2)
    assert drawn["SuperResK5K5"] == pytest.approx(3 * expected, rel=0.2)


def run(island: Island, seed: int = 0) -> list[dict[str, Any]]:
    return in_any_order(island, seed).population()


def test_one_seed_gives_one_population_whatever_the_order() -> None:
    first, second = (run(Island(search()), seed) for seed in (1, 2))
    assert first == second
    assert len(first) == 12
    assert len({row["candidate"] for row in first}) == 12
    assert first != run(Island(ZenNAS(ZenNASConfig(**TINY), SearchInputs(seed=4))))
    assert all(row["parameters"] <= 300_000 and row["layers"] <= 12 for row in first)


def test_goes_on_from_its_state_as_if_it_had_not_been_away() -> None:
    whole, cut = Island(search()), Island(search())
    while cut.told < 40:
        taken = cut.take(4)
        cut.give({index: cut.search.score(candidate, index) for index, candidate in taken[1:]})  # one is under way
        cut.give({index: cut.search.score(candidate, index) for index, candidate in taken[:1]})
    lost = cut.take(3)  # never given back
    assert lost
    again = Island(search())
    again.restore(json.loads(json.dumps(cut.state())))
    assert run(again) == run(whole)
    assert (again.told, again.scored, again.spent) == (whole.told, whole.scored, whole.spent)


def test_candidates_over_budget_are_never_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def scored(_: ZenNAS, candidate: str, index: int) -> float:
        seen.append(candidate)
        return index

    monkeypatch.setattr(ZenNAS, "rate", scored)
    small = search(budget={"layers": 7, "parameters": 40_000})
    assert len(Island(search(budget=small.config.budget, iterations=2000)).take(99)) == small.ahead, "spent turns count"
    island = Island(small)
    run(island)
    assert island.spent > 0 and island.scored == len(seen) > 0
    assert all(layers(parse(candidate)) <= 7 for candidate in seen)
    assert all(small.costs(candidate)["parameters"] <= 40_000 for candidate in seen)


def test_failed_scores_are_no_members(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: ZenNAS, __: str, index: int) -> dict[str, float]:
        return {"score": float("nan")} if index % 2 else {}

    monkeypatch.setattr(ZenNAS, "score", broken)
    island = Island(search())
    assert run(island) == []
    with pytest.raises(ValueError, match=r"got no network within .*expected one; allow more"):
        island.search.winner()


def test_candidates_over_a_latency_are_measured_and_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"K7": 3.0, "K5": 2.0}
    monkeypatch.setattr(
        ZenNAS, "latency_ms", lambda _, __, text: sum(value for name, value in slow.items() if name in text)
    )
    monkeypatch.setattr(ZenNAS, "rate", lambda _, text, __: float(len(text)))
    by_latency = Island(search(budget={"latency": {"ms": 2.5}}))
    rows = run(by_latency)
    assert {row["latency_ms"] for row in rows} <= {0.0, 2.0}


def test_a_latency_that_the_smallest_networks_do_not_have_ends_the_search_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(ZenNAS, "latency_ms", lambda _, __, candidate: seen.append(candidate) or 0.7 + 1 / len(seen))
    island = Island(search(budget={"latency": {"ms": 0.1}, "layers": 6}))
    first = island.take(6)
    with pytest.raises(
        ValueError, match=r"got latency: 0\.1 ms, expected more than 0\.8667, .* the 6 smallest networks"
    ):
        island.give({index: island.search.score(candidate, index) for index, candidate in first})
    assert seen == island.search.smallest()  # type: ignore[attr-defined]
    table = search(budget={"latency": {"ms": 0.1, "device": "cuda", "table": "v100.json"}})
    assert (table.probes, table.total) == ([], TINY["iterations"])  # that was refused at POST


def test_what_is_under_way_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor after the search was away, and as soon as it was told and fell through, it may be."""
    monkeypatch.setattr(ZenNAS, "child", lambda *_: START["cifar"])
    monkeypatch.setattr(ZenNAS, "first_child", lambda *_: START["cifar"])
    one = search()
    assert one.ask(0) == START["cifar"] and one.ask(1) is None
    again = search()
    again.restore(json.loads(json.dumps(one.state())))
    assert again.ask(2) is None
    again.tell(0, START["cifar"], {})
    assert again.ask(3) == START["cifar"]


def test_islands_without_a_network_say_what_all_of_them_saw() -> None:
    islands = [ZenNAS(search(budget={"latency": {"ms": 0.1}}).config, SearchInputs(island=n)) for n in range(2)]
    for ms, island in zip((0.7, 0.5), islands, strict=True):
        island.tell(0, START["cifar"], {"latency_ms": ms})
    islands[0].merge(islands[1:])
    with pytest.raises(ValueError, match=rf"by {2 * islands[1].total} candidates, of which the fastest took 0\.5 ms"):
        islands[0].winner()


def test_a_gpu_budget_without_gpus_is_refused_with_the_choice_of_a_table() -> None:
    config = ZenNASConfig(**{**TINY, "budget": {"latency": {"ms": 0.1, "device": "cuda"}}})
    assert config.problems("cuda") == []
    ((where, said),) = config.problems("cpu")
    assert where == ("budget", "latency") and "name its file in table" in said


def test_the_best_never_gets_worse_and_the_front_has_the_cheap_ones() -> None:
    island, best = Island(search()), []
    while not island.done:
        island.give({index: island.search.score(candidate, index) for index, candidate in island.take(1)})
        best += [row["score"] for row in island.search.population()[:1]]
    assert best == sorted(best)
    found: Any = island.search
    by_flops = front(found.networks(), "flops")
    assert [row["score"] for row in by_flops] == sorted(row["score"] for row in by_flops)
    assert by_flops[0]["flops"] < min(row["flops"] for row in found.population())
    winner = found.winner()
    assert winner.model == {"name": "zennet", "structure": winner.structure, "image_size": 8}
    assert [block["channels"] for block in winner.blocks] == [part.width for part in parse(winner.structure)]


@pytest.mark.parametrize("seed", range(3))
def test_short_as_it_is_a_search_leaves_its_start_behind(seed: int) -> None:
    """By eight seeds the best had 33 to 47 and each member 22 or more, where the start has 6 to 14: noise of two."""
    made = ZenNAS(ZenNASConfig(**TINY), SearchInputs(seed=seed))
    rows = run(Island(made))
    assert made.rate(START["cifar"], seed) < 15
    assert rows[0]["score"] > 30 and all(row["score"] > 20 for row in rows)
    assert all(row["parameters"] <= 300_000 and row["layers"] <= 12 for row in rows)


def test_starts_from_the_smallest_where_the_start_is_over_budget() -> None:
    assert [text(start) for start in search().starts] == [START["cifar"]]
    small = search(budget={"parameters": 20_000})
    assert [{part.width for part in start} for start in small.starts] == [{8}]
    assert small.costs(text(small.starts[0]))["parameters"] < 20_000


def test_a_start_that_is_too_slow_is_not_the_only_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ZenNAS, "latency_ms", lambda _, __, candidate: float(parse(candidate)[2].width))
    monkeypatch.setattr(ZenNAS, "rate", lambda _, candidate, __: float(len(candidate)))
    rows = run(Island(search(budget={"latency": {"ms": 16}})))  # the start has 32 there
    assert rows and all(row["latency_ms"] <= 16 for row in rows)


def test_impossible_budgets_are_told_with_what_is_possible() -> None:
    config = ZenNASConfig(**{**TINY, "budget": {"parameters": 100, "layers": 3}})
    (where, said), (_, about_layers) = config.problems("cpu")
    least = min(ZenNASConfig(**TINY).costs(s)["parameters"] for s in smallest(parse(START["cifar"]), "server"))
    assert where == ("budget", "parameters")
    assert said == f"got 100, expected at least {least:,}, which the smallest network has; allow as much"
    assert "expected at least 6" in about_layers
    assert ZenNASConfig(**{**TINY, "budget": {"parameters": least}}).problems("cpu") == []


def test_what_the_start_has_is_feasible_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start below what 8 channels have: it is within its own costs, and drawn again."""
    monkeypatch.setattr(ZenNAS, "rate", lambda _, candidate, __: float(len(candidate)))
    change: dict[str, Any] = {"initial": "SuperConvK3BNRELU(3,4,1,1)SuperResK3K3(4,4,2,4,1)", "iterations": 300}
    costs = search(**change).costs(change["initial"])
    assert costs["parameters"] < 500
    tight = search(**change, budget={name: int(cost) for name, cost in costs.items()})
    assert tight.config.problems("cpu") == []
    assert change["initial"] in [row["candidate"] for row in run(Island(tight))]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"initial": "SuperConvK3BNRELU(3,8,1,1)SuperResK3K4(8,8,1,8,1)"}, "at character 26, expected one such as"),
        ({"initial": "SuperConvK3BNRELU(5,8,1,1)"}, "at character 0, which sees images, expected 3 channels"),
        ({"initial": "SuperConvK3BNRELU(3,8,1,999999999999)"}, "at most 999 layers"),
        ({"initial": "imagenett"}, "got 'imagenett', expected a structure string or one of cifar"),
        ({"budget": {}}, "expected one of parameters, flops, layers"),
        ({"budget": {"flops": 0}}, "greater than or equal to 1"),
        ({"populaton": 3}, "Extra inputs"),
    ],
)
def test_wrong_configs(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ZenNASConfig(**{**TINY, **change})
