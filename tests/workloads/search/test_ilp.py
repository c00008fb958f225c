"""What integer programming says of budgets, and of what it could not prove (BINAS, arXiv 2110.12399)."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from workloads.models.architecture import costs
from workloads.search import ilp
from workloads.search.bilinear import Bilinear, Problem, Shape
from workloads.search.binas import BinasConfig

SHAPE = Shape(stages=1, blocks=2, configurations=2, depths=(1, 2))
GAIN = Bilinear.of_terms(SHAPE, 70.0, np.array([[[0.1, 0.4], [0.2, 0.6]]]))
FLOPS = Bilinear.of_terms(SHAPE, 1000.0, np.array([[[10, 20], [1000, 3000]]]))
LAYERS = Bilinear.of_terms(SHAPE, 0.0, np.ones((1, 2, 2)))


def problem(**limits: float) -> Problem:
    return Problem(SHAPE, GAIN, {"flops": FLOPS, "layers": LAYERS}, limits)


@pytest.fixture
def out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS finds what it finds, and then says that its time was over."""
    milp = scipy.optimize.milp

    def late(*args: Any, **options: Any) -> Any:
        found = milp(*args, **options)
        found.status, found.message, found.mip_dual_bound = 1, "Time limit reached", found.fun - 0.25
        return found

    monkeypatch.setattr(ilp, "milp", late)


def test_counts_are_told_as_integers() -> None:
    said = r"^got flops: 12, expected at least 1,010, the least that a network of the space has within layers: 1; allow"
    with pytest.raises(ilp.Infeasible, match=said):
        ilp.smallest(problem(layers=1, flops=12))
    ((where, sentence),) = BinasConfig.model_validate({"budget": {"layers": 1}}).problems("cpu")
    assert where == ("budget", "layers") and sentence.startswith("got layers: 1, expected at least 10, the least")


def test_the_least_of_each_cost_is_known() -> None:
    assert ilp.least(problem()) == {"flops": 1010, "layers": 1}
    config = BinasConfig.model_validate({"budget": {"layers": 20}})
    network = config.space.architecture([[0] * 4] * 5, [0] * 5)
    counts = costs(network, stem=32, features=1280, classes=1000, size=224)
    assert config.least() == {"parameters": counts.parameters, "flops": counts.flops, "layers": 10}


def test_what_is_not_proven_to_be_the_best_is_said(out_of_time: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert ilp.solve(problem(flops=2020)).tolist() == [1, 0, 1]
    assert "a network that may be 0.25 from the best: Time limit reached" in caplog.text


def test_what_is_not_proven_to_be_infeasible_is_not_called_so(out_of_time: None) -> None:
    with pytest.raises(ilp.Unsolved, match="got no network with flops: 12 in 100 s, only one with 1,010"):
        ilp.smallest(problem(flops=12))
    assert BinasConfig.model_validate({"budget": {"layers": 1}}).problems("cpu") == []


def test_no_network_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        x, status, message = None, 1, "Time limit reached"

    monkeypatch.setattr(ilp, "milp", lambda *_, **__: Nothing)
    with pytest.raises(ilp.Unsolved, match="got no network by HiGHS in 100 s, expected one: Time limit reached"):
        ilp.smallest(problem(flops=2000))
