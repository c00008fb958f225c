"""Bilinear problems solved as the paper of BINAS does (arXiv 2110.12399): block coordinate Frank-Wolfe.

Relaxed, the decisions move inside their simplices, alpha or beta at a time. For the other one fixed, objective and
budgets are linear: a linear program says which corner to move towards, and any mixture with where we are stays within
the budgets. What comes out is made sparse by programs whose prices are its own values: a corner has at most one simplex
for each budget on which more than one choice is left. Then it is rounded. That may break a budget, which the released
code accepts; here the network is repaired (`Problem.repaired`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.random import Generator
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import eye_array, kron

from workloads.search.bilinear import Array, Problem
from workloads.search.ilp import smallest

Block = Literal["alpha", "beta"]
SPARSIFY = 100  # programs at most


class Relaxed:
    """A point between networks."""

    def __init__(self, problem: Problem, network: Array) -> None:
        self.problem = problem
        self.alpha, self.beta = problem.shape.one_hot(network)

    def slope(self, block: Block) -> Array:
        """Of the objective."""
        return self._linear(block, None)[0]

    def _linear(self, block: Block, cost: str | None) -> tuple[Array, float]:
        form = self.problem.objective if cost is None else self.problem.costs[cost]
        return form.of_alpha(self.beta) if block == "alpha" else form.of_beta(self.alpha)

    def corner(self, block: Block, price: Array) -> Array | None:
        """Where the budgets allow most of `price`, the other block as it is; None: rounding left nothing."""
        size = self.problem.shape.configurations if block == "alpha" else len(self.problem.shape.depths)
        best = np.eye(size)[price.reshape(-1, size).argmax(axis=1)].ravel()
        limits = [(*self._linear(block, name), limit) for name, limit in self.problem.limits.items()]
        if all(slope @ best + constant <= limit for slope, constant, limit in limits):
            return best
        simplices = kron(eye_array(len(price) // size), np.ones((1, size))).tocsc()
        constraints = [LinearConstraint(simplices, 1, 1)]
        constraints += [LinearConstraint(s[None] / limit, -np.inf, 1 - c / limit) for s, c, limit in limits]
        found = milp(-price, bounds=Bounds(0, 1), constraints=constraints)  # nothing is integral: a linear program
        return None if found.x is None else np.asarray(found.x)

    def move(self, block: Block, towards: Array, step: float) -> None:
        now = self.alpha if block == "alpha" else self.beta
        now += step * (towards - now)


def iterates(
    problem: Problem, start: Array, random: Generator, *, steps: int, step: float, momentum: float
) -> Iterator[Relaxed]:
    """The way of the relaxed point; it is the same object each time.

    Args:
        problem: to be solved.
        start: a network within the budgets.
        random: which block moves; the first two times it is beta.
        steps: in number.
        step: towards the corner, as a share of the way.
        momentum: of the slopes.
    """
    point = Relaxed(problem, start)
    slopes: dict[Block, Array] = {}
    for k in range(steps):
        blocks: list[Block] = ["alpha", "beta"] if k > 1 and random.random() < 0.5 else ["beta", "alpha"]
        for block in blocks:
            slope = point.slope(block)
            slopes[block] = momentum * slopes.get(block, slope) + (1 - momentum) * slope
            corner = point.corner(block, slopes[block])
            if corner is not None:
                point.move(block, corner, step)
                break
        yield point


def sparsify(point: Relaxed) -> None:
    """Moves the point to where few simplices have more than one choice left, and the likely choices stay."""
    prices: dict[Block, Array] = {"alpha": point.alpha.copy(), "beta": point.beta.copy()}
    blocks: list[Block] = ["beta", "alpha"]
    still = 0
    for k in range(SPARSIFY):
        block = blocks[k % 2]
        before = point.alpha.copy() if block == "alpha" else point.beta.copy()
        corner = point.corner(block, prices[block])
        if corner is not None:
            point.move(block, corner, 1.0)
        after = point.alpha if block == "alpha" else point.beta
        still = still + 1 if np.allclose(before, after, atol=1e-3) else 0
        if still == 2:
            return


def solve(
    problem: Problem, random: Generator, *, steps: int = 1000, step: float = 0.002, momentum: float = 0.9
) -> Array:
    """A good network within the budgets; the arguments are those of `iterates`.

    Raises:
        Infeasible: there is none.
    """
    start = smallest(problem)
    *_, point = iterates(problem, start, random, steps=steps, step=step, momentum=momentum)
    sparsify(point)
    return problem.repaired(problem.shape.nearest(point.alpha, point.beta), start)
