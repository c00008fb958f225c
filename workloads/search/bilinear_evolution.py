"""The baseline of BINAS (arXiv 2110.12399): evolution of networks within the budgets, as Once-for-All does it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from workloads.search.bilinear import Array, Problem
from workloads.search.ilp import smallest

POPULATION, GENERATIONS = 100, 500
PARENTS = POPULATION // 4
MUTATION = 0.1  # of each decision
DRAWS = 100  # of a child at most: hardly any network may be within the budgets


def solve(problem: Problem, random: Generator, *, generations: int = GENERATIONS) -> Array:
    """A good network within the budgets.

    Half of the children are mutations of parents, half have decisions of two of them; whoever breaks a budget is drawn
    again.

    Raises:
        Infeasible: there is none.
    """
    choices, start = problem.shape.choices, smallest(problem)

    def anything(n: int) -> Array:
        return random.integers(choices, size=(n, len(choices)))

    population = _within(problem, anything, np.repeat(start[None], POPULATION, axis=0))
    mutations = (POPULATION - PARENTS) // 2
    for _ in range(generations):
        parents = population[np.argsort(-problem.value(population), kind="stable")[:PARENTS]]

        def some(n: int, parents: Array = parents) -> Array:
            return parents[random.integers(PARENTS, size=n)]

        def mutated(n: int) -> Array:
            return np.where(random.random((n, len(choices))) < MUTATION, anything(n), some(n))

        def crossed(n: int) -> Array:
            return np.where(random.random((n, len(choices))) < 0.5, some(n), some(n))

        mutants = _within(problem, mutated, some(mutations))
        mixed = _within(problem, crossed, some(POPULATION - PARENTS - mutations))
        population = np.concatenate([parents, mutants, mixed])
    best: Array = population[problem.value(population).argmax()]
    return best


def _within(problem: Problem, draw: Callable[[int], Array], otherwise: Array) -> Array:
    """As many networks within the budgets as `otherwise` has, which takes the place of those that were never drawn."""
    found, left = otherwise.copy(), np.arange(len(otherwise))
    for _ in range(DRAWS):
        drawn = draw(len(left))
        fits = problem.excess(drawn) == 0
        found[left[fits]] = drawn[fits]
        left = left[~fits]
        if not len(left):
            break
    return found
