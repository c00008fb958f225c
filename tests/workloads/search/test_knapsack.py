"""Dynamic programming, mutation and brute force agree; what cannot be met says what could."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator, default_rng

from workloads.search import knapsack
from workloads.search.budget import Infeasible
from workloads.search.knapsack import Choice, Groups, Option, best, by_mutation


def drawn(random: Generator, groups: int = 4, options: int = 4) -> list[list[Option]]:
    """As a search has them: the first changes nothing, others are worse or better, slower or faster."""
    return [[Option(0.0, 0.0), *(Option(*random.normal(size=2)) for _ in range(options - 1))] for _ in range(groups)]


def brute_force(groups: Groups, budget: float) -> list[Choice]:
    found = []
    for picks in itertools.product(*(range(len(group)) for group in groups)):
        options = [group[pick] for group, pick in zip(groups, picks, strict=True)]
        value, cost = (math.fsum(column) for column in zip(*options, strict=True))
        if cost <= budget:
            found.append(Choice(value, cost, picks))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(100))
def test_all_three_agree(seed: int) -> None:
    random = default_rng(seed)
    groups = drawn(random)
    least = sum(min(option.cost for option in group) for group in groups)
    budget = float(random.uniform(least, 4))
    expected = brute_force(groups, budget)[:5]
    found = best(groups, budget, keep=5)
    assert [choice.picks for choice in found] == [choice.picks for choice in expected]
    assert found[0][:2] == pytest.approx(expected[0][:2]) and all(choice.cost <= budget for choice in found)
    assert by_mutation(groups, budget, random, turns=2000)[0].picks == expected[0].picks


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 5), st.integers(1, 30))
def test_the_first_of_any_number_of_groups_options_and_results(seed: int, groups: int, options: int, keep: int) -> None:
    random = default_rng(seed)
    of = [[Option(*random.normal(size=2)) for _ in range(options)] for _ in range(groups)]
    expected = brute_force(of, 10.0)[:keep]
    found = best(of, 10.0, keep)
    assert [choice.picks for choice in found] == [choice.picks for choice in expected]


def test_equal_options_are_all_found() -> None:
    groups = [[Option(1.0, 1.0)] * 2, [Option(0.0, 0.0), Option(0.0, 1.0)]]
    assert len(best(groups, 2.0, keep=9)) == 4 and best(groups, 2.0)[0][:2] == (1.0, 1.0)


def test_the_budget_is_kept_to_the_last_digit() -> None:
    groups = [[Option(0.0, 0.0), Option(1.0, 0.5)], [Option(0.0, 0.0), Option(1.0, 0.25)]]
    assert best(groups, 0.75)[0].picks == (1, 1)
    assert best(groups, float(np.nextafter(0.75, 0)))[0] == (1.0, 0.25, (0, 1))  # the cheaper of two that are equal


def test_in_bins_the_budget_is_kept_and_little_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    random = default_rng(3)
    groups = drawn(random, groups=8, options=30)
    exact = best(groups, 1.0, keep=10)
    monkeypatch.setattr(knapsack, "MOST", 100)
    binned = best(groups, 1.0, keep=10)
    assert all(choice.cost <= 1.0 for choice in binned) and binned[0].value <= exact[0].value
    assert binned[0].value > 0.98 * exact[0].value


@pytest.mark.parametrize("solver", [best, lambda groups, budget: by_mutation(groups, budget, default_rng(0))])
def test_a_budget_that_nothing_meets_says_the_least(solver: object) -> None:
    groups = [[Option(0, 0), Option(-1, -0.25)], [Option(0, 0), Option(1, 3)]]
    with pytest.raises(Infeasible, match=r"got a budget of -0\.3, expected at least -0\.25") as caught:
        solver(groups, -0.3)  # type: ignore[operator]
    assert caught.value.least == -0.25
    assert solver(groups, -0.25)[0].picks == (1, 0)  # type: ignore[operator]
