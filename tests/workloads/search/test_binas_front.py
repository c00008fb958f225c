"""What BINAS says of the costs of decisions, and of networks for less, beside every network of a small space."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from workloads.models.binas_space import Space
from workloads.search.bilinear import Array, Bilinear, Problem
from workloads.search.binas_accuracy import decisions
from workloads.search.binas_costs import counted, shape_of
from workloads.search.binas_front import BUDGETS, below, mean_costs

SPACE = Space(
    stem=8, first=8, widths=(8, 16), strides=(1, 2), relu_stages=1, min_depth=1, max_depth=2,
    expansions=(2, 3), kernels=(3, 5), se=(False,), last=16, features=12,
)  # fmt: skip
SHAPE = shape_of(SPACE)
EVERY: Array = np.array(list(itertools.product(*map(range, SHAPE.choices))))


@pytest.fixture(scope="module")
def problem() -> Problem:
    random = np.random.default_rng(0)
    accuracy = Bilinear.of_terms(SHAPE, 60.0, random.random((2, 2, 4)), random.random((2, 2)))
    return Problem(SHAPE, accuracy, counted(SPACE, 16, 4), {"layers": 3, "flops": 300_000})


def test_costs_of_a_decision_are_means_over_all_networks_that_have_it(problem: Problem) -> None:
    for fixed in decisions(SPACE).values():
        has = np.ones(len(EVERY), bool)
        for (stage, block), configuration in fixed.configuration.items():
            has &= EVERY[:, stage * SHAPE.blocks + block] == configuration
        for stage, depth in fixed.depth.items():
            has &= EVERY[:, SHAPE.stages * SHAPE.blocks + stage] == depth
        point = SHAPE.one_hot(EVERY[has])
        expected = {name: form(*point).mean() for name, form in problem.costs.items()}
        assert mean_costs(problem, fixed) == pytest.approx(expected)


def test_networks_for_less_are_the_best_of_the_space_and_within_the_other_budgets(problem: Problem) -> None:
    flops, feasible = problem.costs["flops"](*SHAPE.one_hot(EVERY)), EVERY[problem.excess(EVERY) == 0]
    best = feasible[problem.value(feasible).argmax()]
    found = below(problem, best, "flops")
    assert 1 < len(found) <= BUDGETS
    cheapest = found[0]
    assert problem.costs["flops"](*SHAPE.one_hot(cheapest)) == flops.min()
    for network in found:
        cost = problem.costs["flops"](*SHAPE.one_hot(network))
        cheaper = feasible[problem.costs["flops"](*SHAPE.one_hot(feasible)) <= cost]
        assert problem.excess(network) == 0
        assert problem.value(network) == pytest.approx(problem.value(cheaper).max())


def test_below_the_cheapest_there_is_nothing_else(problem: Problem) -> None:
    (cheapest,) = below(problem, EVERY[problem.costs["flops"](*SHAPE.one_hot(EVERY)).argmin()], "flops")
    assert problem.costs["flops"](*SHAPE.one_hot(cheapest)) == problem.costs["flops"](*SHAPE.one_hot(EVERY)).min()
