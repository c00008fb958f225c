"""The search of BINAS on a supernet (arXiv 2110.12399): what is measured, what comes out, what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import spearmanr

from tests.learning import RealImages, pretrained
from tests.toy_search import TOY_SPACE, in_any_order
from workloads import assemble, weights
from workloads.data.pack import pack_digits
from workloads.data.reader import Reader
from workloads.data.transforms.image import normalise
from workloads.data.views import View
from workloads.models.architecture import costs, parse
from workloads.models.binas_space import Paths, Space
from workloads.models.binas_supernet import BinasSupernet
from workloads.models.encoders import build_encoder, classifier_of
from workloads.search import binas_costs
from workloads.search.base import SearchInputs
from workloads.search.binas import LATENCY, Binas, BinasConfig
from workloads.search.binas_accuracy import Fixed, decisions
from workloads.search.binas_costs import table_of
from workloads.search.budget import Infeasible
from workloads.search.island import Island
from workloads.spec import Named, Stream

TOY: dict[str, Any] = {
    "space": TOY_SPACE, "image_size": 16, "classes": 4, "passes": 2, "batch_size": 16, "budget": {"flops": 300_000},
}  # fmt: skip


@pytest.fixture
def inputs(toy_shards: dict[str, str]) -> SearchInputs:
    """Forty images, and a supernet that knows their statistics, though no labels."""
    manifest = assemble.open_stream(Stream(shards=toy_shards["test"]))
    images = normalise(Reader(manifest, {"image": View(size=16)}, batch_size=40).batch(0)["image"], View(size=16))

    def start(network: BinasSupernet) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = BinasSupernet(network.space, network.num_classes)
            for _ in range(30):
                fresh(images, fresh.space.random_paths(torch.randint(2**40, (40,))))
            with torch.no_grad():  # so that no class is named for all
                fresh.classifier.bias -= fresh.eval()(images).mean(dim=0)  # type: ignore[operator]
        network.load_state_dict(fresh.state_dict())

    return SearchInputs(seed=3, open={"validation": manifest}.__getitem__, start=start)  # type: ignore[arg-type]


def test_decisions_are_those_of_the_card() -> None:
    space = Space()
    found = decisions(space)
    assert len(found) == 1 + 5 * 3 + 5 * 4 * 12
    assert found["base"] == Fixed()
    assert found["stage 2 of 3 blocks"] == Fixed(depth={1: 1})
    assert found["stage 1 block 1 k3_e3"] == Fixed({(0, 0): 0})
    assert found["stage 3 block 4 k5_e6_se"] == Fixed({(2, 3): 11}, {2: 2})  # the depth that ends at it
    assert found["stage 3 block 2 k5_e3"] == Fixed({(2, 1): 2}, {2: 0})  # which the shallowest has
    paths = found["stage 3 block 4 k5_e6_se"].of(space.random_paths(torch.arange(100)))
    assert set(paths.configuration[:, 2, 3].tolist()) == {11} and set(paths.depth[:, 2].tolist()) == {2}
    assert len(set(paths.configuration[:, 2, 2].tolist())) == 12


def test_accuracy_is_that_of_the_images_whose_label_is_named(inputs: SearchInputs) -> None:
    search = Binas(BinasConfig(**TOY), inputs)
    whole = Fixed({(s, b): 1 for s, b in itertools.product(range(2), range(2))}, {0: 1, 1: 0})
    supernet = search.accuracy.supernet
    right = 0
    for images, labels, _ in search.accuracy.batches():
        one = Paths(torch.full((len(labels), 2, 2), 1), torch.tensor([[1, 0]]).expand(len(labels), 2))
        with torch.no_grad():
            right += int((supernet(images, one).argmax(dim=1) == labels).sum())
    assert search.accuracy(whole) == pytest.approx(100 * right / 40)
    base = search.accuracy(Fixed())
    assert base == Binas(BinasConfig(**TOY), inputs).score("base", 5)["score"]
    assert not supernet.training


def test_one_seed_gives_one_result_whatever_the_order(inputs: SearchInputs) -> None:
    first, second = (in_any_order(Island(Binas(BinasConfig(**TOY), inputs)), seed) for seed in (1, 2))
    assert first.population() == second.population()
    assert len(first.population()) == first.total == 1 + 2 * 2 + 2 * 2 * 4
    assert first.winner().structure == second.winner().structure
    scores = [row["score"] for row in first.population()]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 5


def test_goes_on_from_its_state_as_if_it_had_not_been_away(
    inputs: SearchInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1)  # latencies are never the same twice
    monkeypatch.setattr(
        BinasConfig, "measured", lambda self: table_of(self.space, 16, 4, lambda *_: 0.1 + 1e-3 * next(clock))
    )
    config = BinasConfig(**TOY | {"passes": 1, "budget": {"latency": {"ms": 50, "batch_size": 1}}})
    whole, cut = Island(Binas(config, inputs)), Island(Binas(config, inputs))
    while cut.told < 9:
        cut.give({index: cut.search.score(candidate, index) for index, candidate in cut.take(3)})
    assert cut.take(2)  # never given back
    again = Island(Binas(config, inputs))
    again.restore(json.loads(json.dumps(cut.state())))
    table: Any = cut.search.state()["table"]
    assert len(table) > 10
    rows = [in_any_order(island).population() for island in (again, whole)]
    assert rows[0] == [row | {"latency_ms": a["latency_ms"]} for row, a in zip(rows[1], rows[0], strict=True)]
    assert again.search.state()["table"] == table  # measured once
    assert again.search.winner().costs["latency_ms"] < 50


@pytest.mark.parametrize("solver", ["ilp", "bcfw", "evolution"])
def test_the_winner_is_within_budget_and_has_the_weights_of_the_supernet(inputs: SearchInputs, solver: str) -> None:
    search = in_any_order(Island(Binas(BinasConfig(**TOY | {"solver": solver}), inputs)))
    winner = search.winner()
    network: Any = classifier_of(build_encoder(Named.model_validate(winner.model)), 4)
    network.load_state_dict(winner.weights)
    counted = costs(parse(winner.structure), stem=8, features=12, classes=4, size=16)
    assert winner.costs["flops"] == counted.flops <= 300_000 and winner.costs["parameters"] == counted.parameters
    assert sum(p.numel() for p in network.parameters()) == counted.parameters
    network_vector, problem = search.solve()
    configurations, depths = search._parts(network_vector)
    images = torch.randn(3, 3, 16, 16)
    paths = Paths(torch.tensor([configurations] * 3), torch.tensor([depths] * 3))
    with torch.no_grad():
        assert torch.allclose(network.eval()(images), search.accuracy.supernet(images, paths), atol=1e-4)
    assert winner.score == pytest.approx(float(search.estimator()(*search.shape.one_hot(network_vector))))
    if solver == "ilp":
        everything = np.array(list(itertools.product(*map(range, search.shape.choices))))
        values = problem.value(everything)[problem.excess(everything) == 0]
        assert winner.score == pytest.approx(values.max())
    assert [block["channels"] for block in winner.blocks][-1] == 16
    assert all(block["layers"] == 1 and block["size"] in (8, 4) for block in winner.blocks)


def test_the_estimate_of_independent_decisions(inputs: SearchInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where decisions add up, what comes out is the sum; by the code's variant the depth counts twice."""
    gain = {"base": 70.0}

    def scored(self: Binas, candidate: str, index: int) -> dict[str, float]:
        fixed = self.fixed[candidate]
        worth = sum(c - 1.5 for c in fixed.configuration.values()) + sum(3 * (d - 0.5) for d in fixed.depth.values())
        return {"score": gain["base"] + worth}

    monkeypatch.setattr(Binas, "score", scored)
    network = np.array([3, 3, 3, 3, 1, 1])
    for subtract, extra in (("depth", 0.0), ("base", 3.0)):
        search = in_any_order(Island(Binas(BinasConfig(**TOY | {"subtract": subtract}), inputs)))
        value = float(search.estimator()(*search.shape.one_hot(network)))
        assert value == pytest.approx(70 + 4 * 1.5 + 2 * 1.5 + extra)


def test_regression_measures_whole_networks(inputs: SearchInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BinasConfig(**TOY | {"estimator": "regression", "networks": 60})

    def scored(self: Binas, candidate: str, index: int) -> dict[str, float]:
        fixed = self.fixed[candidate]
        return {"score": 50.0 + sum(fixed.configuration.values()) + 2 * sum(fixed.depth.values())}

    real = Binas(config, inputs)
    assert real.score("network 3", 3) == real.score("network 3", 3)
    monkeypatch.setattr(Binas, "score", scored)
    search = in_any_order(Island(Binas(config, inputs)))
    assert search.total == 60 and all(len(fixed.configuration) == 4 for fixed in search.fixed.values())
    network = np.array([3, 0, 2, 1, 1, 0])
    assert float(search.estimator()(*search.shape.one_hot(network))) == pytest.approx(50 + 6 + 2, abs=1.0)
    assert search.winner().costs["flops"] <= 300_000


def test_a_latency_that_nothing_meets_ends_the_search_before_all_else(inputs: SearchInputs) -> None:
    island = Island(Binas(BinasConfig(**TOY | {"budget": {"latency": {"ms": 1e-6, "batch_size": 1}}}), inputs))
    [(index, candidate)] = island.take(1)
    assert candidate == LATENCY
    with pytest.raises(Infeasible, match=r"got latency_ms: .*, expected at least .*; allow as much"):
        island.give({index: island.search.score(candidate, index)})


def test_budgets_that_nothing_meets_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binas_costs, "timed", None)  # nothing is measured
    ok = BinasConfig(**TOY)
    assert ok.problems("cpu") == []
    [(where, said)] = BinasConfig(**TOY | {"budget": {"flops": 1000}}).problems("cpu")
    smallest = ok.space.architecture([[0, 0], [0, 0]], [0, 0])
    least = costs(smallest, stem=8, features=12, classes=4, size=16).flops
    assert where == ("budget", "flops") and said.startswith(f"got flops: 1,000, expected at least {least:,}, the least")
    [(where, said)] = BinasConfig(**TOY | {"budget": {"layers": 1}}).problems("cpu")
    assert where == ("budget", "layers") and "expected at least 2" in said
    [(where, said)] = BinasConfig(**TOY | {"budget": {"latency": {"ms": 1, "device": "cuda"}}}).problems("cpu")
    assert where == ("budget", "latency") and "or a table" in said
    with pytest.raises(ValidationError, match="typo"):
        BinasConfig(**TOY | {"typo": 1})


def test_weights_and_data_that_do_not_fit_are_refused(inputs: SearchInputs, toy_shards: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="got weights without a classifier of 4 classes"):
        Binas(BinasConfig(**TOY), SearchInputs(open=inputs.open, start=lambda _: None)).score("base", 0)
    with pytest.raises(
        ValueError, match="got validation data of 4 classes, 0 samples without label, expected 5 classes"
    ):
        Binas(BinasConfig(**TOY | {"classes": 5}), inputs).score("base", 0)
    with pytest.raises(ValueError, match="got no init:"):
        Binas(BinasConfig(**TOY), SearchInputs(open=inputs.open)).score("base", 0)
    search = Binas(BinasConfig(**TOY), inputs)
    search.tell(0, "base", {})
    with pytest.raises(ValueError, match=r"got no accuracy of 21 of 21 candidates \(base, ...\), expected all"):
        search.winner()


@pytest.mark.slow
def test_the_estimate_ranks_networks_as_the_supernet_does(tmp_path: Path) -> None:
    """Card, check 6: 50 random networks of a supernet of two stages.

    On the digits: of 1,500 photographs of CIFAR-10 it learns too little (accuracies of .27 to .33, correlation .62).
    """
    pack_digits(tmp_path / "digits")
    train, test = (str(tmp_path / "digits" / f"{split}.tar") for split in ("train-{000000..000001}", "test-000000"))
    images = RealImages("digits", train, test)
    space = TOY_SPACE | {"max_depth": 3, "expansions": [2, 4], "last": 32, "features": 32}
    job = images.job(
        {"name": "binas", "largest": 0.3, "dropout": 0, "drop_path": 0, "view": {"crop_scale": [0.8, 1], "flip": 0}},
        model={"name": "binas_supernet", "image_size": 16, **space},
        epochs=8,
        optimizer={"lr": 4e-3, "weight_decay": 0.01},
    )
    pretrained(job, tmp_path, "supernet")

    def trained(network: torch.nn.Module) -> None:
        weights.load_initial(network, "job:supernet", tmp_path)

    manifest = assemble.open_stream(Stream(shards=images.test))
    config = BinasConfig(**TOY | {"space": space, "classes": 10, "passes": 1, "batch_size": 256})
    search = in_any_order(Island(Binas(config, SearchInputs(open=lambda _: manifest, start=trained))))
    networks = np.random.default_rng(5).integers(search.shape.choices, size=(50, len(search.shape.choices)))
    predicted = search.estimator()(*search.shape.one_hot(networks))
    measured = []
    for network in networks:
        configurations, depths = search._parts(network)
        of_blocks = {(s, b): c for s, row in enumerate(configurations) for b, c in enumerate(row)}
        measured.append(search.accuracy(Fixed(of_blocks, dict(enumerate(depths)))))
    assert spearmanr(predicted, measured).statistic > 0.7
