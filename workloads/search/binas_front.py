"""What a BINAS space (arXiv 2110.12399) would give for less: the estimated Pareto front below the best network.

No network of the space is measured whole, so a front is solved for, as the best network was: once for each of some
budgets of a cost, from the least that there is to what the best network has. Exactly, whatever solver found that one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from workloads.search import ilp
from workloads.search.bilinear import Array, Problem
from workloads.search.binas_accuracy import Fixed

BUDGETS = 8


def below(problem: Problem, best: Array, cost: str) -> list[Array]:
    """The best networks within less and less of a cost, and within all other budgets; fewer where some are the same."""

    def cost_of(network: Array) -> float:
        return float(problem.costs[cost](*problem.shape.one_hot(network)))

    others = {name: limit for name, limit in problem.limits.items() if name != cost}
    least = cost_of(ilp.smallest(replace(problem, limits=others | {cost: math.inf})))
    budgets = np.linspace(least, max(least, cost_of(best)), BUDGETS, endpoint=False)
    found = [ilp.solve(replace(problem, limits=others | {cost: float(budget) * (1 + 1e-9)})) for budget in budgets]
    return [*{tuple(network): network for network in found}.values()]


def mean_costs(problem: Problem, fixed: Fixed) -> dict[str, float]:
    """What networks with these decisions cost on average: decisions are independent, so forms may take their means."""
    shape = problem.shape
    alpha = np.full((shape.stages, shape.blocks, shape.configurations), 1 / shape.configurations)
    beta = np.full((shape.stages, len(shape.depths)), 1 / len(shape.depths))
    for place, configuration in fixed.configuration.items():
        alpha[place] = np.eye(shape.configurations)[configuration]
    for stage, depth in fixed.depth.items():
        beta[stage] = np.eye(len(shape.depths))[depth]
    return {name: float(form(alpha.ravel(), beta.ravel())) for name, form in problem.costs.items()}
