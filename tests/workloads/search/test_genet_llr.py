"""LLR-NAS of GENet (arXiv 2006.14090): sums to first order, the order of scores, and a whole search on toy shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.toy import write_shards
from tests.toy_search import in_any_order
from workloads.data.manifest import DataError, open_manifest
from workloads.models.genet import GENet
from workloads.search import block_distillation as distillation
from workloads.search.base import Result, SearchInputs
from workloads.search.budget import Infeasible
from workloads.search.genet_llr import GENetLLR
from workloads.search.genet_space import GENetLLRConfig, branches, parse, replaced, text
from workloads.search.island import Island
from workloads.search.latency_grid import grid
from workloads.search.latency_ops import of_branches
from workloads.search.latency_table import LatencyTable

MASTER: dict[str, Any] = {
    "name": "genet",
    "image_size": 16,
    "stem": 8,
    "blocks": [["XX", 16, 1, 2], ["BL", 32, 2, 2], ["DW", 16, 1, 1]],
    "last": 24,
}
CHOICES = {"kinds": ["XX", "DW"], "kernels": [3], "depths": [0], "widths": [1.0, 1.5]}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device on which a part takes a microsecond, and its values some more."""
    ms: dict[str, dict[str, float]] = {}
    for op in grid(16, 64, widths=[8, 32, 256], kernels=[1, 3]):
        ms.setdefault(op.family, {})[",".join(map(str, op.sizes))] = 1e-3 + 1e-6 * sum(op.sizes)
    file = tmp_path_factory.mktemp("table") / "toy.json"
    LatencyTable(on="cuda", device="toy", torch="2", size=16, batch_size=64, precision="fp16", ms=ms).write(file)
    return file


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shards")
    return {"train": write_shards(folder, "train", 48, 2), "val": write_shards(folder, "val", 40, 1, seed=1)}


@pytest.fixture(scope="module")
def trained(shards: dict[str, str]) -> dict[str, Tensor]:
    """The master after a few steps on the toy's colours."""
    torch.manual_seed(0)
    network = GENet(8, tuple(MASTER["blocks"]), 24, num_classes=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    cpu = torch.device("cpu")
    for _ in range(25):
        for images, label in distillation.in_order(open_manifest(shards["train"]), 16, cpu):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), label).backward()
            optimizer.step()
    return network.state_dict()


@pytest.fixture
def search(table: Path, shards: dict[str, str], trained: dict[str, Tensor]) -> Any:
    def make(ms: float = 1.0, seed: int = 0, **more: Any) -> GENetLLR:
        budget = {"latency": {"ms": ms, "device": "cuda", "table": str(table)}}
        config = {"master": MASTER, "budget": budget, "choices": CHOICES, "steps": 4, "batch_size": 16}
        inputs = SearchInputs(
            seed=seed,
            open=lambda stream: open_manifest(shards[stream]),
            start=lambda network: network.load_state_dict(trained) and None,
        )
        return GENetLLR(GENetLLRConfig.model_validate(config | more), inputs)

    return make


def run(island: Island, seed: int = 0, until: int | None = None) -> list[dict[str, Any]]:
    return in_any_order(island, seed, until).population()


def told(made: GENetLLR, measured: Any) -> GENetLLR:
    """As if the candidates had been measured: `measured` gives (score, ms) of an index."""
    for index in range(made.total):
        score, ms = measured(index)
        made.tell(index, made.ask(index), {"score": score, "latency_ms": ms, "master_ms": measured(0)[1]})
    return made


def test_candidates_are_the_master_and_every_single_replacement(search: Any) -> None:
    made = search()
    candidates = [made.ask(index) for index in range(made.total)]
    assert len(set(candidates)) == made.total == 1 + 3 + 4 + 3
    assert candidates[0] == text(made.config.master)
    own = json.loads(candidates[0])["blocks"]
    for candidate in candidates[1:]:
        assert sum(a != b for a, b in zip(json.loads(candidate)["blocks"], own, strict=True)) == 1


def test_the_sums_are_what_was_measured_for_the_master_and_for_one_replacement(search: Any) -> None:
    made = told(search(ms=100, alternatives=100), lambda index: (0.5 + 0.01 * index, 2 - 0.03 * index))
    rows = {row["candidate"]: row for row in made.solutions()}
    assert len(rows) == 4 * 5 * 4
    for index in range(made.total):
        row = rows[made.ask(index)]
        assert row["score"] == pytest.approx(0.5 + 0.01 * index) and row["replaced"] == min(index, 1)
        assert row["latency_ms"] == pytest.approx(2 - 0.03 * index)
    assert rows[made.ask(0)]["latency_ms"] == 2 and rows[made.ask(0)]["score"] == 0.5
    both = rows[text(replaced(made.config.master, {0: made.network(1).blocks[0], 1: made.network(4).blocks[1]}))]
    assert both["score"] == pytest.approx(0.5 + 0.01 + 0.04) and both["latency_ms"] == pytest.approx(2 - 0.03 - 0.12)
    assert both["replaced"] == 2 and not both["measured"]


def test_what_slows_a_device_slows_the_master_beside_it(search: Any) -> None:
    made = search(ms=100)
    results: list[Result] = [{"score": 0.5, "latency_ms": 2.0, "master_ms": 2.0}]
    results += [{"score": 0.4, "latency_ms": 3.0, "master_ms": 2.0}] * (made.total - 3)
    results += [{"score": 0.4, "latency_ms": 9.0, "master_ms": 6.0}] * 2  # three times as slow
    for index, result in enumerate(results):
        made.tell(index, made.ask(index), result)
    assert made.t0 == 2
    costs = {option.cost for group in made.groups()[0] for option in group}
    assert costs == {0.0, 1.0}


def test_failed_replacements_are_no_options_and_a_failed_master_is_told(search: Any) -> None:
    made = told(search(ms=100), lambda _: (0.5, 1.0))
    made.tell(1, made.ask(1), {})
    made.tell(2, made.ask(2), {"score": float("nan"), "latency_ms": 1.0, "master_ms": 1.0})
    assert len(made.groups()[0][0]) == 4 - 2
    made.tell(0, made.ask(0), {})
    assert made.population() == []
    with pytest.raises(ValueError, match="got no measurement of the master"):
        made.winner()


def test_a_budget_that_nothing_meets_says_the_least(search: Any) -> None:
    """The last replacement of each block, 3, 7 and 10, is its fastest: together they save 1 ms of 2."""
    made = told(search(ms=0.99), lambda index: (0.5, 2 - 0.05 * index))
    with pytest.raises(Infeasible, match=r"got latency_ms: 0\.99, expected at least 1,.* allow as much"):
        made.winner()
    assert len(made.population()) == made.total  # what was measured is kept all the same
    just = told(search(ms=1.01), lambda index: (0.5, 2 - 0.05 * index)).winner()
    assert just.costs["latency_ms"] == pytest.approx(1) and just.costs["replaced"] == 3


def test_a_whole_search(search: Any) -> None:
    loose = run(Island(search()))
    ms = sorted(row["latency_ms"] for row in loose)
    made = search(ms=(ms[0] + ms[len(ms) // 2]) / 2)
    rows, winner, solved = run(Island(made)), made.winner(), made.solutions()
    again = run(Island(search(ms=made.config.ms)), seed=7)
    assert rows == again  # whatever the order
    assert rows[0]["candidate"] == winner.structure and rows[: len(solved)] == solved
    scores = [row["score"] for row in solved]
    assert scores == sorted(scores, reverse=True) and winner.score == scores[0]
    assert all(row["latency_ms"] <= made.config.ms for row in solved)
    assert {"parameters", "flops", "layers", "latency_ms"} <= winner.costs.keys()
    assert winner.model == {"name": "genet", "image_size": 16, **json.loads(winner.structure)}
    network = parse(winner.structure, made.config.master)
    assert [block["channels"] for block in winner.blocks] == [8, *(b.channels for b in network.blocks), 24]
    assert [block["size"] for block in winner.blocks] == [8, 4, 2, 2, 2]
    for row in loose:  # of a table: exactly what it says
        if row["measured"]:
            parts = of_branches(branches(parse(row["candidate"], made.config.master)), 16)
            assert row["latency_ms"] == pytest.approx(made._latency.table.predict(parts)) and 0 <= row["score"] <= 1


def test_goes_on_from_its_state_as_if_it_had_not_been_away(search: Any) -> None:
    whole, cut = Island(search()), Island(search())
    run(cut, until=5)
    cut.take(2)  # never given back
    again = Island(search())
    again.restore(json.loads(json.dumps(cut.state())))
    assert again.told >= 5
    assert run(again, seed=3) == run(whole)
    assert again.search.winner() == whole.search.winner()


def test_scores_depend_on_seed_and_index_alone(search: Any) -> None:
    first, second, other = search(), search(), search(seed=1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    scores = [first.score(first.ask(i), i) for i in (0, 5, 8)]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert [second.score(second.ask(i), i) for i in (8, 5, 0)] == scores[::-1]
    block = [distilled(made, 5) for made in (first, second, other)]
    assert torch.equal(block[0], block[1]) and not torch.equal(block[0], block[2])


def distilled(made: GENetLLR, index: int) -> Tensor:
    """The first weights of a replacement, as its score starts from them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(made.torch_random(index).initial_seed())
        at, network = made.config.replacements[index - 1]
        return next(distillation.fresh(network, at, made.config.master.blocks[at].channels).parameters())


def test_distillation_brings_a_block_near_what_it_replaces(search: Any, shards: dict[str, str]) -> None:
    """And touches nothing else of the master."""
    made = search()
    master, cpu = made._master, torch.device("cpu")
    before = {name: value.clone() for name, value in master.state_dict().items()}
    torch.manual_seed(0)
    block = distillation.fresh(made.network(5), 1, 32)
    assert made.network(5).blocks[1].channels == 48 and len(block) == 2  # a linear convolution back to 32

    def off() -> float:
        (images, _), *_ = distillation.in_order(open_manifest(shards["val"]), 16, cpu)
        with torch.no_grad():
            x = master.blocks[0](master.stem(images))
            y = master.blocks[1](x)
            return float((block.eval()(x) - y).square().mean() / y.square().mean())

    images = distillation.shuffled(open_manifest(shards["train"]), 16, cpu, batch_size=16, steps=60, seed=0)
    at_start = off()
    distillation.distil(block, master, 1, images, steps=60, lr=5e-3)
    assert off() < 0.5 * at_start
    assert all(torch.equal(value, before[name]) for name, value in master.state_dict().items())
    judged = distillation.with_block(master, 1, block)
    assert judged.blocks[1] is block and master.blocks[1] is not block and judged.blocks[0] is master.blocks[0]


def test_another_width_is_a_network_of_the_space(search: Any) -> None:
    """The linear convolution behind a block of another width, multiplied into the next one, is what it stands for."""
    made = search()
    torch.manual_seed(0)
    network = replaced(made.config.master, {0: made.network(1).blocks[0]})
    assert network.blocks[0].channels == 24
    block, master = distillation.fresh(network, 0, 16), made._master
    judged, built = distillation.with_block(master, 0, block).eval(), network.build()
    built.reset_classifier(4)
    built.load_state_dict(
        {name: value for name, value in master.state_dict().items() if not name.startswith("blocks.0.")}
        | {f"blocks.0.{name}": value for name, value in block[0].state_dict().items()}
        | {
            name: torch.einsum("omhw,mihw->oihw", master.state_dict()[name], block[1].weight)
            for name in ("blocks.1.0.branch.0.0.weight", "blocks.1.0.shortcut.0.weight")
        }
    )
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(built.eval()(images), judged(images), rtol=1e-4, atol=1e-4)


def test_the_master_needs_a_classifier(search: Any, trained: dict[str, Tensor], table: Path) -> None:
    made = search()
    encoder = {name: value for name, value in trained.items() if not name.startswith("fc.")}
    headless = SearchInputs(
        open=made.inputs.open, start=lambda network: network.load_state_dict(encoder, strict=False) and None
    )
    with pytest.raises(ValueError, match=r"without a classifier of 4 classes.*a job of fine_tune"):
        GENetLLR(made.config, headless).score(made.ask(0), 0)
    with pytest.raises(ValueError, match="got no init:"):
        GENetLLR(made.config, SearchInputs(open=made.inputs.open)).score(made.ask(0), 0)


def test_val_needs_labels(tmp_path: Path, search: Any) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "val-000000.tar"), mtime=0) as writer:
        writer.write({"__key__": "a", "png": b""})
    made = search()
    blind = SearchInputs(open=lambda _: open_manifest(str(tmp_path / "val-000000.tar")), start=made.inputs.start)
    with pytest.raises(DataError, match=r"got 1 of 1 samples of val without label.*hold out labelled ones"):
        GENetLLR(made.config, blind).score(made.ask(0), 0)


def test_measured_where_there_is_no_table(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The master beside each replacement, and once alone."""
    seen: list[int] = []

    def measured(networks: list[nn.Module], *, size: int, **how: Any) -> list[float]:
        assert size == 16 and all(p.is_meta for network in networks for p in network.parameters())
        seen.append(len(networks))
        return [3.0, 4.0][: len(networks)]

    monkeypatch.setattr("workloads.search.latency_budget.measure_all", measured)
    made = search(budget={"latency": {"ms": 9, "batch_size": 2}}, steps=1)
    results = [made.score(made.ask(index), index) for index in (0, 1)]
    assert [(result["master_ms"], result["latency_ms"]) for result in results] == [(3, 3), (3, 4)] and seen == [1, 2]


def test_without_a_table_all_latencies_are_asked_first_and_what_nothing_meets_ends_it(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last replacement of each block, 3, 7 and 10, is its fastest: together they save 1 ms of 2."""
    monkeypatch.setattr(GENetLLR, "_accuracy", lambda _, __, number: 0.5 + 0.01 * number)

    made = search()
    numbers = {made.ask(number): number for number in range(made.count)}
    monkeypatch.setattr(GENetLLR, "_latencies", lambda _, of: [2 - 0.05 * numbers[text(network)] for network in of])

    def measuring(ms: float) -> Island:
        return Island(search(budget={"latency": {"ms": ms, "batch_size": 2}}))

    island = measuring(0.99)
    assert island.search.total == 2 * made.total
    first = island.take(made.count)
    results = {index: island.search.score(candidate, index) for index, candidate in first}
    assert not any("score" in result for result in results.values())
    with pytest.raises(Infeasible, match=r"got latency_ms: 0\.99, expected at least 1,"):
        island.give(results)
    rows = run(enough := measuring(1.01))
    by_table = told(search(ms=1.01), lambda number: (0.5 + 0.01 * number, 2 - 0.05 * number))
    assert rows == [row | {"latency_ms": pytest.approx(row["latency_ms"])} for row in by_table.population()]
    assert enough.search.winner().structure == by_table.winner().structure
