"""What BINAS (Nayman et al. 2022, arXiv 2110.12399) knows of a space: forms that are bilinear in its decisions.

Decisions are vectors on simplices: alpha, which configuration each block of each stage has, and beta, where each stage
ends; a network has one 1 on each. Accuracy, latency, multiply-adds and parameters are all

    constant + p alpha + q beta + alpha Q beta

with p of first blocks, which are always there, and Q of the others. Q is cumulative: a stage that ends at a block has
the blocks before it, so these contribute to that entry of beta too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a space.

    A network is a vector of integers: the configuration of each block, stage by stage, then the depth of each stage.

    Attributes:
        stages: in number.
        blocks: of each stage at most.
        configurations: of each block.
        depths: how many blocks a stage may have, rising.
    """

    stages: int
    blocks: int
    configurations: int
    depths: tuple[int, ...]

    @property
    def choices(self) -> Array:
        """How many values each decision has."""
        sizes = [self.configurations] * (self.stages * self.blocks) + [len(self.depths)] * self.stages
        return np.array(sizes)

    def one_hot(self, network: Array) -> tuple[Array, Array]:
        """[..., decisions] -> alpha [..., stages x blocks x configurations] and beta [..., stages x depths]."""
        at = self.stages * self.blocks
        alpha = np.eye(self.configurations)[network[..., :at]]
        beta = np.eye(len(self.depths))[network[..., at:]]
        return alpha.reshape(*network.shape[:-1], -1), beta.reshape(*network.shape[:-1], -1)

    def nearest(self, alpha: Array, beta: Array) -> Array:
        """The network of the largest entry on each simplex."""
        rows = alpha.reshape(-1, self.configurations), beta.reshape(-1, len(self.depths))
        return np.concatenate([row.argmax(axis=1) for row in rows])


@dataclass(frozen=True)
class Bilinear:
    """One form; see the module.

    Attributes:
        constant: of every network.
        p: [alpha].
        q: [beta].
        Q: [alpha, beta].
    """

    constant: float
    p: Array
    q: Array
    Q: Array

    @classmethod
    def of_terms(cls, shape: Shape, constant: float, blocks: Array, depths: Array | None = None) -> Bilinear:
        """From what each decision adds.

        Args:
            shape: of the space.
            constant: of every network.
            blocks: [stages, blocks, configurations], added where the stage has that block.
            depths: [stages, depths]; None: nothing.
        """
        p, Q = np.zeros_like(blocks, dtype=float), np.zeros((*blocks.shape, shape.stages, len(shape.depths)))
        p[:, 0] = blocks[:, 0]
        for stage in range(shape.stages):
            for d, depth in enumerate(shape.depths):
                Q[stage, 1:depth, :, stage, d] = blocks[stage, 1:depth]
        q = np.zeros(shape.stages * len(shape.depths)) if depths is None else np.asarray(depths, float).ravel()
        return cls(constant, p.ravel(), q, Q.reshape(p.size, q.size))

    def __call__(self, alpha: Array, beta: Array) -> Any:
        """[..., alpha], [..., beta] -> [...]."""
        return self.constant + alpha @ self.p + beta @ self.q + ((alpha @ self.Q) * beta).sum(axis=-1)

    def of_alpha(self, beta: Array) -> tuple[Array, float]:
        """Slope [alpha] and constant of what it is for a given beta."""
        return self.p + self.Q @ beta, self.constant + float(beta @ self.q)

    def of_beta(self, alpha: Array) -> tuple[Array, float]:
        """Likewise for a given alpha."""
        return self.q + alpha @ self.Q, self.constant + float(alpha @ self.p)


@dataclass(frozen=True)
class Problem:
    """To find the network that has the most of `objective` within the budgets.

    Attributes:
        shape: of the space.
        objective: accuracy.
        costs: by name.
        limits: the most of some of them.
    """

    shape: Shape
    objective: Bilinear
    costs: Mapping[str, Bilinear]
    limits: Mapping[str, float]

    def value(self, network: Array) -> Any:
        """Of networks [..., decisions]: [...]."""
        return self.objective(*self.shape.one_hot(network))

    def excess(self, network: Array) -> Any:
        """By how much they break the budgets, as shares of these, summed; 0: they do not."""
        point = self.shape.one_hot(network)
        over = [np.maximum(self.costs[name](*point) / limit - 1, 0) for name, limit in self.limits.items()]
        total = np.sum(over, axis=0) if over else np.zeros(network.shape[:-1])
        return np.where(total < 1e-9, 0.0, total)  # rounding

    def neighbours(self, network: Array) -> Array:
        """All that differ from it by one decision, [n, decisions]."""
        found = []
        for place, size in enumerate(self.shape.choices):
            for value in set(range(size)) - {int(network[place])}:
                found.append(network.copy())
                found[-1][place] = value
        return np.stack(found)

    def repaired(self, network: Array, feasible: Array) -> Array:
        """The network if it is within the budgets, else what is, by steps to the best neighbour.

        Rounding may break a budget: at each step the neighbour that breaks it least is taken, of several that are
        within it the best one. Where no neighbour is any better, which takes two budgets, `feasible` is what is left.
        """
        while (excess := self.excess(network)) > 0:
            around = self.neighbours(network)
            over = self.excess(around)
            best = np.lexsort((-self.value(around), over))[0]
            if over[best] >= excess:
                return feasible
            network = around[best]
        return network


def fit(alpha: Array, beta: Array, accuracy: Array, *, cutoff: float = 10.0) -> Bilinear:
    """The form that is nearest to measured networks, by linear regression in closed form.

    Features are all products of alpha and beta, alpha, and beta, centred. Simplices make many of them dependent, so
    the pseudo-inverse leaves out directions whose singular value is below 1 / `cutoff`.

    Args:
        alpha: [N, alpha], one row for each network.
        beta: [N, beta].
        accuracy: [N].
        cutoff: see above.
    """
    products = (alpha[:, :, None] * beta[:, None]).reshape(len(alpha), -1)
    features = np.concatenate([products, alpha, beta], axis=1)
    mean = features.mean(axis=0)
    left, values, right = np.linalg.svd(features - mean, full_matrices=False)
    kept = values >= 1 / cutoff
    weights = right[kept].T @ (left[:, kept].T @ (accuracy - accuracy.mean()) / values[kept])
    Q, p, q = np.split(weights, [products.shape[1], products.shape[1] + alpha.shape[1]])
    return Bilinear(float(accuracy.mean() - mean @ weights), p, q, Q.reshape(alpha.shape[1], beta.shape[1]))


def contributions(
    shape: Shape,
    base: float,
    depths: Array,
    blocks: Array,
    *,
    subtract_depth: bool = True,
) -> Bilinear:
    """The estimator of accuracy from what was measured with one decision fixed and all others random.

    Args:
        shape: of the space.
        base: accuracy with nothing fixed.
        depths: [stages, depths], with that depth.
        blocks: [stages, blocks, configurations], with that configuration of that block, where it is not the first of
            its stage with the shallowest depth that has it.
        subtract_depth: from blocks that are not the first, what was measured with that depth, as in the paper; else
            `base`, as in the released code, which then counts the depth twice.
    """
    added = blocks - base
    if subtract_depth:
        for block in range(1, shape.blocks):
            added[:, block] = blocks[:, block] - depths[:, entry_of(shape.depths, block)][:, None]
    return Bilinear.of_terms(shape, base, added, depths - base)


def entry_of(depths: Sequence[int], block: int) -> int:
    """Which of the depths is the shallowest that has the block, counted from 0."""
    return next(d for d, depth in enumerate(depths) if depth > block)
