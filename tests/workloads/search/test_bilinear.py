"""Bilinear forms of BINAS and what solves them (arXiv 2110.12399), by a toy solved by hand and by brute force."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.search import bcfw, bilinear_evolution, ilp
from workloads.search.bilinear import Array, Bilinear, Problem, Shape, contributions, entry_of, fit
from workloads.search.budget import Infeasible

SHAPE = Shape(stages=1, blocks=3, configurations=2, depths=(2, 3))
ACCURACY = Bilinear.of_terms(SHAPE, 70.0, np.array([[[0.1, 0.4], [0.0, 0.3], [0.1, 0.6]]]), np.array([[0.5, 0.8]]))
LATENCY = Bilinear.of_terms(SHAPE, 0.0, np.array([[[3, 5], [2, 4], [2, 4]]]))
SOLVERS: dict[str, Callable[[Problem], Array]] = {
    "ilp": ilp.solve,
    "bcfw": lambda problem: bcfw.solve(problem, np.random.default_rng(1)),
    "evolution": lambda problem: bilinear_evolution.solve(problem, np.random.default_rng(0), generations=30),
}


def toy(limit: float) -> Problem:
    return Problem(SHAPE, ACCURACY, {"latency_ms": LATENCY}, {"latency_ms": limit})


def latency(network: Array) -> float:
    return float(LATENCY(*SHAPE.one_hot(network)))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("limit", "best"), [(11, 71.8), (13, 72.1), (9, 71.5)])
def test_the_toy_of_the_card(solver: str, limit: float, best: float) -> None:
    problem = toy(limit)
    network = SOLVERS[solver](problem)
    assert problem.value(network) == pytest.approx(best)
    assert latency(network) <= limit
    if limit == 11:
        assert network.tolist() in ([0, 1, 1, 1], [1, 0, 1, 1])  # depth 3; a tie
    if limit == 13:
        assert network.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(10))
def test_what_is_rounded_is_repaired(seed: int) -> None:
    """At 9 ms some seeds round to a network of 11 ms, though every iterate was within the budget.

    With the defaults all ten end at 71.5, of which seeds 1 and 5 are tested, as each takes a second; a tenth of the
    steps, ten times as large, end where they may.
    """
    problem = toy(9)
    network = bcfw.solve(problem, np.random.default_rng(seed), steps=100, step=0.02)
    assert latency(network) <= 9 and problem.value(network) > problem.value(ilp.smallest(problem))


@pytest.mark.parametrize("seed", range(10))
def test_where_rounding_breaks_nothing_any_seed_finds_the_best(seed: int) -> None:
    """As the card has it for 1,000 steps of .002; here a tenth of them, ten times as large."""
    for limit, best in ((11, 71.8), (13, 72.1)):
        problem = toy(limit)
        network = bcfw.solve(problem, np.random.default_rng(seed), steps=100, step=0.02)
        assert problem.value(network) == pytest.approx(best) and latency(network) <= limit


def test_rounding_alone_breaks_the_budget() -> None:
    """As that of two of the ten seeds does: in alpha .45 and .55, of which the larger is the slower."""
    problem = toy(9)
    *_, point = bcfw.iterates(
        problem, ilp.smallest(problem), np.random.default_rng(5), steps=1000, step=0.002, momentum=0.9
    )
    bcfw.sparsify(point)
    assert LATENCY(point.alpha, point.beta) <= 9 + 1e-6
    rounded = SHAPE.nearest(point.alpha, point.beta)
    assert latency(rounded) == 11
    assert problem.value(problem.repaired(rounded, ilp.smallest(problem))) == pytest.approx(71.5)


def test_repair() -> None:
    problem, feasible = toy(9), np.array([0, 0, 0, 0])
    assert problem.repaired(np.array([0, 1, 1, 1]), feasible).tolist() == [0, 0, 1, 1]  # the best of three that fit
    assert problem.repaired(np.array([1, 1, 1, 1]), feasible).tolist() == [1, 1, 1, 0]  # it breaks the budget less
    assert problem.repaired(np.array([0, 0, 0, 1]), feasible).tolist() == [0, 0, 0, 1]  # it fits
    shape = Shape(1, 1, 2, (1,))
    a, b = (Bilinear.of_terms(shape, 0.0, np.array([[costs]])) for costs in ([1.0, 4.0], [4.0, 1.0]))
    stuck = Problem(shape, a, {"a": a, "b": b}, {"a": 2.0, "b": 3.0})
    assert stuck.repaired(np.array([0, 0]), feasible[:2]).tolist() == [0, 0]  # either breaks a budget: the last resort


def test_latency_of_a_network_is_the_sum_of_its_blocks() -> None:
    shape, rng = Shape(2, 4, 3, (2, 3, 4)), np.random.default_rng(0)
    table = rng.uniform(1, 3, (2, 4, 3))
    form = Bilinear.of_terms(shape, 7.0, table)
    for network in rng.integers(shape.choices, size=(50, len(shape.choices))):
        configurations, depths = network[:8].reshape(2, 4), network[8:]
        blocks = [table[s, b, configurations[s, b]] for s in range(2) for b in range(shape.depths[depths[s]])]
        assert form(*shape.one_hot(network)) == pytest.approx(7 + sum(blocks))


def test_forms_are_linear_in_either_block() -> None:
    rng = np.random.default_rng(0)
    alpha, beta = (rng.dirichlet(np.ones(n), size=m).ravel() for n, m in ((2, 3), (2, 1)))
    slope, constant = ACCURACY.of_alpha(beta)
    assert slope @ alpha + constant == pytest.approx(ACCURACY(alpha, beta))
    for step in (1e-3, 0.5):
        differences = [(ACCURACY(alpha + step * e, beta) - ACCURACY(alpha, beta)) / step for e in np.eye(6)]
        assert differences == pytest.approx(slope, abs=1e-9)
    slope, constant = ACCURACY.of_beta(alpha)
    assert slope @ beta + constant == pytest.approx(ACCURACY(alpha, beta))
    differences = [(ACCURACY(alpha, beta + 0.5 * e) - ACCURACY(alpha, beta)) / 0.5 for e in np.eye(2)]
    assert differences == pytest.approx(slope, abs=1e-9)


def test_contributions_are_cumulative_and_copy_what_was_measured() -> None:
    """With what is worth the same everywhere, the estimate is exact; by the code's variant depth counts twice."""
    depths = np.array([[70.5, 70.8]])
    blocks = np.array([[[70.1, 70.4], [70.5, 70.8], [70.9, 71.4]]])  # behind the first, with their depth
    before = blocks.copy()
    form = contributions(SHAPE, 70.0, depths, blocks)
    assert np.array_equal(blocks, before)
    assert form.Q.reshape(3, 2, 2)[:, :, 1] == pytest.approx(ACCURACY.Q.reshape(3, 2, 2)[:, :, 1])
    assert form.Q.reshape(3, 2, 2)[2, :, 0].tolist() == [0, 0]  # the third block is not there
    for network in itertools.product(*map(range, SHAPE.choices)):
        point = SHAPE.one_hot(np.array(network))
        assert form(*point) == pytest.approx(ACCURACY(*point))
    other = contributions(SHAPE, 70.0, depths, blocks, subtract_depth=False)
    whole = SHAPE.one_hot(np.array([1, 1, 1, 1]))
    assert other(*whole) - form(*whole) == pytest.approx(0.5 + 0.8)
    assert [entry_of((2, 3, 4), block) for block in range(4)] == [0, 0, 1, 2]


def test_regression_finds_a_form_without_noise() -> None:
    shape, rng = Shape(2, 2, 2, (1, 2)), np.random.default_rng(0)
    truth = Bilinear(70.0, *(rng.normal(size=size) for size in (8, 4, (8, 4))))
    networks = rng.integers(shape.choices, size=(600, len(shape.choices)))
    alpha, beta = shape.one_hot(networks)
    found = fit(alpha[:400], beta[:400], truth(alpha[:400], beta[:400]))
    assert np.abs(found(alpha[400:], beta[400:]) - truth(alpha[400:], beta[400:])).max() < 1e-6


def test_iterates_stay_within_simplices_and_budgets() -> None:
    problem = toy(9)
    count = 0
    for point in bcfw.iterates(
        problem, ilp.smallest(problem), np.random.default_rng(0), steps=400, step=0.02, momentum=0.9
    ):
        assert np.abs(point.alpha.reshape(3, 2).sum(axis=1) - 1).max() < 1e-6 and point.alpha.min() > -1e-9
        assert abs(point.beta.sum() - 1) < 1e-6 and point.beta.min() > -1e-9
        assert LATENCY(point.alpha, point.beta) <= 9 + 1e-6
        count += 1
    assert count == 400


def random_problem(seed: int) -> tuple[Problem, Array]:
    """A small one with two budgets, and all of its networks."""
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(1, 4))
    shape = Shape(2, blocks, int(rng.integers(1, 4)), tuple(range(int(rng.integers(1, blocks + 1)), blocks + 1)))
    size = (2, blocks, shape.configurations)
    objective = Bilinear.of_terms(shape, 50.0, rng.normal(size=size), rng.normal(size=(2, len(shape.depths))))
    if seed % 3 == 0:  # of a regression every product counts
        objective = Bilinear(50.0, objective.p, objective.q, rng.normal(size=objective.Q.shape))
    costs = {name: Bilinear.of_terms(shape, 1.0, rng.uniform(1, 3, size)) for name in ("flops", "latency_ms")}
    networks = np.array(list(itertools.product(*map(range, shape.choices))))
    found = {name: form(*shape.one_hot(networks)) for name, form in costs.items()}
    limits = {name: float(np.quantile(values, rng.uniform(0, 0.8))) for name, values in found.items()}
    return Problem(shape, objective, costs, limits), networks


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_integer_programming_is_brute_force(seed: int) -> None:
    problem, networks = random_problem(seed)
    within = networks[problem.excess(networks) == 0]
    if len(within):
        network = ilp.solve(problem)
        assert problem.excess(network) == 0
        assert problem.value(network) == pytest.approx(problem.value(within).max(), abs=1e-6)
    else:
        with pytest.raises(Infeasible):
            ilp.solve(problem)


@pytest.mark.parametrize("seed", range(6))
def test_the_others_stay_within_the_budgets(seed: int) -> None:
    problem, networks = random_problem(seed + 100)
    if not (problem.excess(networks) == 0).any():
        pytest.skip("nothing is within its budgets")
    for found in (
        bcfw.solve(problem, np.random.default_rng(0), steps=40, step=0.05),
        bilinear_evolution.solve(problem, np.random.default_rng(0), generations=3),
    ):
        assert problem.excess(found) == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_that_nothing_meets(solver: str) -> None:
    with pytest.raises(Infeasible, match=r"^got latency_ms: 4.900, expected at least 5.000, the least") as caught:
        SOLVERS[solver](toy(4.9))
    assert caught.value.name == "latency_ms"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_budgets_that_nothing_meets_together() -> None:
    shape = Shape(1, 1, 2, (1,))
    a, b = (Bilinear.of_terms(shape, 0.0, np.array([[costs]])) for costs in ([1000, 4000], [4000, 1000]))
    problem: Any = Problem(shape, a, {"flops": a, "parameters": b}, {"flops": 2000, "parameters": 3000})
    with pytest.raises(Infeasible, match=r"got parameters: 3,000, expected at least 4,000, .* within flops: 2,000"):
        ilp.smallest(problem)


def test_the_size_of_the_paper_takes_seconds() -> None:
    """240 configurations and 15 depths: exact, and no worse than what the others find."""
    shape, rng = Shape(5, 4, 12, (2, 3, 4)), np.random.default_rng(0)
    objective = Bilinear.of_terms(shape, 70.0, rng.normal(size=(5, 4, 12)), rng.normal(size=(5, 3)))
    cost = Bilinear.of_terms(shape, 1.0, rng.uniform(1, 3, (5, 4, 12)))
    problem = Problem(shape, objective, {"latency_ms": cost}, {"latency_ms": 24.0})
    best = ilp.solve(problem)
    others = bcfw.solve(problem, rng, steps=100), bilinear_evolution.solve(problem, rng, generations=50)
    assert problem.excess(best) == 0
    assert all(problem.value(best) >= problem.value(other) for other in others)
