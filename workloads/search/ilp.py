"""Bilinear problems solved exactly, by integer programming with HiGHS (Huangfu and Hall 2018), which SciPy brings.

Each product of a configuration and a depth becomes a variable z. Of a block and a stage, z summed over configurations
is the depth's variable, and summed over depths the configuration's: with one 1 on each simplex, z can only be the
product. The paper gives the quadratic program to CPLEX as it is.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, csr_array, eye_array, kron

from workloads.search.bilinear import Array, Bilinear, Problem, Shape
from workloads.search.budget import COUNTED, Infeasible

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 100.0  # as in the paper


class Unsolved(ValueError):
    """HiGHS neither found a network within the budgets nor proved that there is none."""


class Found(NamedTuple):
    network: Array
    proven: bool  # that no other has less


class Program:
    """The variables of a space, and what holds for every network: alpha, beta, then one z for each product in use."""

    def __init__(self, shape: Shape, forms: list[Bilinear]) -> None:
        """For forms over a space: products that have no weight in any of them get no variable."""
        self.shape = shape
        C, D = shape.configurations, len(shape.depths)
        blocks, stages = shape.stages * shape.blocks, shape.stages
        used = np.any([form.Q != 0 for form in forms], axis=0).reshape(blocks, C, stages, D).any(axis=(1, 3))
        self.pairs = np.argwhere(used)  # of a block and a stage
        n = len(self.pairs)
        block_of, stage_of = (csr_array(np.eye(size)[self.pairs[:, i]]) for i, size in enumerate((blocks, stages)))
        over_configurations = kron(eye_array(n), kron(np.ones((1, C)), eye_array(D)))
        over_depths = kron(eye_array(n), kron(eye_array(C), np.ones((1, D))))
        one_each = [kron(eye_array(n_rows), np.ones((1, size))) for n_rows, size in ((blocks, C), (stages, D))]
        sums = [
            [one_each[0], None, None],
            [None, one_each[1], None],
            [None, -kron(stage_of, eye_array(D)), over_configurations],
            [-kron(block_of, eye_array(C)), None, over_depths],
        ]
        self.equal = block_array(sums if n else [row[:2] for row in sums[:2]], format="csc")
        self.right = np.r_[np.ones(blocks + stages), np.zeros(self.equal.shape[0] - blocks - stages)]
        self.integral = np.r_[np.ones(blocks * C + stages * D), np.zeros(n * C * D)]

    def row(self, form: Bilinear) -> Array:
        """Its coefficients."""
        C, D = self.shape.configurations, len(self.shape.depths)
        Q = form.Q.reshape(-1, C, self.shape.stages, D).transpose(0, 2, 1, 3)
        return np.r_[form.p, form.q, Q[tuple(self.pairs.T)].ravel()]

    def minimise(self, form: Bilinear, within: list[tuple[Bilinear, float]]) -> Found | None:
        """The network with the least of `form` whose other forms are at most so much; None: there is none.

        Raises:
            Unsolved: the time was over before there was one.
        """
        constraints = [LinearConstraint(self.equal, self.right, self.right)]
        for cost, limit in within:
            constraints.append(LinearConstraint(self.row(cost)[None] / limit, -np.inf, 1 - cost.constant / limit))
        options = {"time_limit": TIME_LIMIT_S, "mip_rel_gap": 0.0}
        found = milp(
            self.row(form), integrality=self.integral, bounds=Bounds(0, 1), constraints=constraints, options=options
        )
        if found.x is None:
            if found.status == 2:
                return None
            raise Unsolved(f"got no network by HiGHS in {TIME_LIMIT_S:.0f} s, expected one: {found.message}")
        if found.status != 0:
            short = found.fun - found.mip_dual_bound
            logger.warning("HiGHS ended with a network that may be %.3g from the best: %s", short, found.message)
        sizes = np.cumsum([len(form.p), len(form.q)])
        return Found(self.shape.nearest(found.x[: sizes[0]], found.x[sizes[0] : sizes[1]]), found.status == 0)


def least(problem: Problem) -> dict[str, float]:
    """The least of each cost, whatever the others."""
    program, found = Program(problem.shape, list(problem.costs.values())), {}
    for name, form in problem.costs.items():
        cheapest = program.minimise(form, [])
        assert cheapest is not None, "without budgets every network will do"
        found[name] = float(form(*problem.shape.one_hot(cheapest.network)))
    return found


def smallest(problem: Problem) -> Array:
    """A network within the budgets: with the least of the last one that the others allow.

    Raises:
        Infeasible: there is none; says the least of a budget that those before it allow.
        Unsolved: the time was over before that was known.
    """
    program = Program(problem.shape, list(problem.costs.values()))
    network: Array = np.zeros(len(problem.shape.choices), int)
    before: list[str] = []
    for name, limit in problem.limits.items():
        form = problem.costs[name]
        cheapest = program.minimise(form, [(problem.costs[one], problem.limits[one]) for one in before])
        assert cheapest is not None, "the budgets before were met"
        network = cheapest.network
        cost = float(form(*problem.shape.one_hot(network)))
        if cost > limit * (1 + 1e-9):
            said, expected = _said(name, limit), _said(name, cost)
            if not cheapest.proven:
                raise Unsolved(f"got no network with {name}: {said} in {TIME_LIMIT_S:.0f} s, only one with {expected}")
            others = ", ".join(f"{one}: {_said(one, problem.limits[one])}" for one in before)
            raise Infeasible(
                name,
                cost,
                f"got {name}: {said}, expected at least {expected}, the least that a network of the space "
                f"has{' within ' * bool(others)}{others}; allow as much",
            )
        before.append(name)
    return network


def _said(name: str, cost: float) -> str:
    """At least as much, so that it is enough; what is counted without decimals."""
    if name in COUNTED:
        return f"{math.ceil(cost - 1e-6):,}"
    digits = max(0, 3 - math.floor(math.log10(cost)))
    return f"{math.ceil(cost * 10**digits - 1e-6) / 10**digits:,.{digits}f}"


def solve(problem: Problem) -> Array:
    """The best network within the budgets.

    Raises:
        Infeasible: there is none.
        Unsolved: the time was over before there was one.
    """
    feasible = smallest(problem)
    objective = problem.objective
    lost = Bilinear(-objective.constant, -objective.p, -objective.q, -objective.Q)
    program = Program(problem.shape, [lost, *(problem.costs[name] for name in problem.limits)])
    found = program.minimise(lost, [(problem.costs[name], limit) for name, limit in problem.limits.items()])
    return feasible if found is None else problem.repaired(found.network, feasible)  # HiGHS may exceed it by 1e-6
