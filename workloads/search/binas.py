"""BINAS (Nayman et al. 2022, arXiv 2110.12399): the most accurate network of a supernet within a budget.

`method: {name: binas}` has trained the supernet; its weights come by `init:`, labelled images that it has not seen by
the stream `validation`. Candidates are decisions: each is fixed while all others are random, and what the supernet then
classifies rightly says what the decision is worth. From these the accuracy of every network is estimated by a bilinear
form (`search.bilinear`), costs are forms too (`search.binas_costs`), and the best network within the budgets is found
by integer programming, by block coordinate Frank-Wolfe or by evolution. It starts from its weights in the supernet.

The same random paths go with every decision, which the paper leaves open: what they do to accuracy then cancels in
differences. `estimator: regression` measures whole random networks instead and fits the form to them. Latencies of all
blocks are the first candidate, measured once; where several workers score, others are under way beside it, which a
table of `manta latency-table` avoids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from numpy.random import default_rng
from pydantic import Field

from workloads.models.architecture import text
from workloads.models.binas import Binas as Network
from workloads.models.binas_space import Space
from workloads.search import bcfw, bilinear_evolution, ilp
from workloads.search.base import Result, Search, SearchConfig, SearchInputs, Winner
from workloads.search.bilinear import Array, Bilinear, Problem, contributions, fit
from workloads.search.binas_accuracy import Accuracy, Fixed, decisions, of_block, of_depth
from workloads.search.binas_costs import PartLatency, blocks_of, counted, latency, shape_of, table_of
from workloads.search.binas_front import below, mean_costs
from workloads.search.budget import COUNTED, Budget, Infeasible
from workloads.search.latency_ops import TableError

LATENCY = "latency table"  # the candidate that measures one


class BinasConfig(SearchConfig):
    """`{name: binas, budget: {latency: {ms: 40, batch_size: 1}}}`.

    Attributes:
        space: of the supernet, as its `model:` said.
        image_size: side of the images, of which FLOPs and latency are counted too.
        classes: of the supernet.
        budget: what the network may cost; layers are blocks of the stages.
        solver: ilp is exact, unless its 100 s end first, which the log says; the others are the paper's own and its
            baseline.
        estimator: contributions of decisions, or a regression over random networks.
        passes: over the images for each decision, each time with other paths.
        networks: that regression measures.
        subtract: from what is measured of a block behind the first of its stage: what was measured with that depth, as
            in the paper, or with nothing fixed, as in the released code, which counts the depth twice.
        batch_size: of the images.
    """

    space: Space = Space()
    image_size: int = Field(default=224, ge=8)
    classes: int = Field(default=1000, ge=2)
    budget: Budget
    solver: Literal["ilp", "bcfw", "evolution"] = "ilp"
    estimator: Literal["contributions", "regression"] = "contributions"
    passes: int = Field(default=10, ge=1)
    networks: int = Field(default=10_000, ge=2)  # of the code
    subtract: Literal["depth", "base"] = "depth"
    batch_size: int = Field(default=256, ge=1)

    def problem(self, objective: Bilinear | None = None, table: dict[str, float] | None = None) -> Problem:
        """What is to be solved.

        Args:
            objective: accuracy; None: whatever.
            table: of latencies; None: latency is no budget.
        """
        shape, costs = shape_of(self.space), counted(self.space, self.image_size, self.classes)
        limits = {name: float(bound) for name in COUNTED if (bound := getattr(self.budget, name)) is not None}
        if table is not None and self.budget.latency is not None:
            costs["latency_ms"] = latency(self.space, self.image_size, table)
            limits["latency_ms"] = self.budget.latency.ms
        return Problem(shape, objective or Bilinear.of_terms(shape, 0.0, np.zeros(self._blocks)), costs, limits)

    @property
    def _blocks(self) -> tuple[int, int, int]:
        shape = shape_of(self.space)
        return shape.stages, shape.blocks, shape.configurations

    def looked_up(self) -> dict[str, float] | None:
        """Latencies by the table of the budget; None: it has none."""
        if self.budget.latency is None or self.budget.latency.table is None:
            return None
        return self.measured()

    def measured(self) -> dict[str, float]:
        """Latencies of all blocks, by measurement if the budget has no table."""
        assert self.budget.latency is not None
        return table_of(self.space, self.image_size, self.classes, PartLatency(self.budget.latency, self.image_size))

    def least(self) -> Mapping[str, float]:
        return ilp.least(self.problem(table=self.looked_up()))

    def problems(self, device: str) -> list[tuple[tuple[str | int, ...], str]]:
        budget = self.budget.latency
        if said := [] if budget is None else budget.problems(device, self.image_size):
            return [(("budget", "latency"), problem) for problem in said]
        try:
            ilp.smallest(self.problem(table=self.looked_up()))
        except Infeasible as error:
            where = ("budget", "latency", "ms") if error.name == "latency_ms" else ("budget", error.name)
            return [(where, str(error))]
        except TableError as error:
            return [(("budget", "latency"), str(error))]
        except ilp.Unsolved:
            return []  # nothing is known to be wrong; the search looks again
        return []


class Binas(Search):
    """Candidates are what is measured, in words: `base`, `stage 2 of 3 blocks`, `stage 2 block 1 k5_e6_se`."""

    Config = BinasConfig
    paper = "BINAS, Nayman et al. 2022, arXiv 2110.12399"
    streams = ("validation",)
    starts_from_weights = True
    ahead = 4096  # a list that no score changes
    config: BinasConfig

    def __init__(self, config: BinasConfig, inputs: SearchInputs) -> None:
        super().__init__(config, inputs)
        self.shape = shape_of(config.space)
        self.fixed = decisions(config.space) if config.estimator == "contributions" else self._networks()
        measures = config.budget.latency is not None and config.budget.latency.table is None
        self._candidates = [*([LATENCY] if measures else []), *self.fixed]
        self.accuracy = Accuracy(
            config.space,
            inputs,
            size=config.image_size,
            classes=config.classes,
            passes=config.passes,
            batch_size=config.batch_size,
        )
        self._accuracy: dict[str, float] = {}
        self._table: dict[str, float] | None = None

    def _networks(self) -> dict[str, Fixed]:
        found = {}
        for n in range(self.config.networks):
            network = self.random(n).integers(self.shape.choices)
            configurations, depths = self._parts(network)
            of_blocks = {(s, b): c for s, row in enumerate(configurations) for b, c in enumerate(row)}
            found[f"network {n}"] = Fixed(of_blocks, dict(enumerate(depths)))
        return found

    def _parts(self, network: Array) -> tuple[list[list[int]], list[int]]:
        """Configurations [stages][blocks] and depths [stages]."""
        at = self.shape.stages * self.shape.blocks
        return network[:at].reshape(self.shape.stages, -1).tolist(), network[at:].tolist()

    @property
    def total(self) -> int:
        return len(self._candidates)

    def ask(self, index: int) -> str:
        return self._candidates[index]

    def score(self, candidate: str, index: int) -> Result:
        """Top-1 accuracy in %, or ms of each block."""
        return self.config.measured() if candidate == LATENCY else {"score": self.accuracy(self.fixed[candidate])}

    def tell(self, index: int, candidate: str, result: Result) -> None:
        if candidate == LATENCY and result:
            self._table = dict(result)
            ilp.smallest(self.config.problem(table=self._table))  # refuses before all else is measured
        elif "score" in result:
            self._accuracy[candidate] = result["score"]

    def state(self) -> Any:
        return {"accuracy": self._accuracy, "table": self._table}

    def restore(self, state: Any) -> None:
        self._accuracy, self._table = dict(state["accuracy"]), state["table"]

    def population(self) -> list[dict[str, Any]]:
        """Decisions. As the score of one is a mean over random networks that have it, so are its costs."""
        index = {candidate: i for i, candidate in enumerate(self._candidates)}
        rows = [
            {"candidate": name, "index": index[name], "score": score, **self._mean_costs(name)}
            for name, score in self._accuracy.items()
        ]
        return sorted(rows, key=lambda row: (-row["score"], row["index"]))

    @cached_property
    def _mean_costs(self) -> Callable[[str], dict[str, float]]:
        """First asked for behind the first accuracy, when latencies are known."""
        problem = self.config.problem(table=self._latencies)
        return cache(lambda candidate: mean_costs(problem, self.fixed[candidate]))

    def estimator(self) -> Bilinear:
        """Accuracy in % as a form.

        Raises:
            ValueError: not everything was measured.
        """
        if missing := [name for name in self.fixed if name not in self._accuracy]:
            raise ValueError(
                f"got no accuracy of {len(missing)} of {len(self.fixed)} candidates ({missing[0]}, ...), expected all; "
                "the log says why, then search again"
            )
        space, shape, got = self.config.space, self.shape, self._accuracy
        if self.config.estimator == "regression":
            networks = np.stack([self.random(n).integers(shape.choices) for n in range(self.config.networks)])
            return fit(*shape.one_hot(networks), np.array([got[name] for name in self.fixed]))
        depths = [[got[of_depth(space, s, d)] for d in range(len(shape.depths))] for s in range(shape.stages)]
        blocks = [
            [[got[of_block(space, s, b, c)] for c in range(shape.configurations)] for b in range(shape.blocks)]
            for s in range(shape.stages)
        ]
        by_depth = self.config.subtract == "depth"
        return contributions(shape, got["base"], np.array(depths), np.array(blocks), subtract_depth=by_depth)

    def solve(self) -> tuple[Array, Problem]:
        """The best network within the budgets, and what it solves.

        Raises:
            Infeasible: there is none.
        """
        table = self._latencies
        if table is None and self.config.budget.latency is not None:
            raise ValueError("got no latency table, expected one to be measured; the log says why, then search again")
        problem, random = self.config.problem(self.estimator(), table), default_rng((self.inputs.seed, 1))
        if self.config.solver == "ilp":
            return ilp.solve(problem), problem
        return (bcfw if self.config.solver == "bcfw" else bilinear_evolution).solve(problem, random), problem

    @property
    def _latencies(self) -> dict[str, float] | None:
        return self.config.looked_up() if self._table is None else self._table

    def networks(self) -> list[dict[str, Any]]:
        """The winner, and the best networks for less FLOPs and, where it is a budget, less latency; by the estimate."""
        best, problem = self.solve()
        costs = [cost for cost in ("flops", "latency_ms") if cost in problem.costs]
        found = {self._structure(network): network for cost in costs for network in below(problem, best, cost)}
        found |= {self._structure(best): best}
        rows: list[dict[str, Any]] = [
            {"candidate": structure, "score": float(problem.value(network)), **self._costs_of(network, problem)}
            for structure, network in found.items()
        ]
        rows.sort(key=lambda row: -row["score"])
        return [row | {"index": self.total + i} for i, row in enumerate(rows)]

    def _structure(self, network: Array) -> str:
        return text(self.config.space.architecture(*self._parts(network)))

    def _costs_of(self, network: Array, problem: Problem) -> dict[str, float]:
        return {name: float(cost(*self.shape.one_hot(network))) for name, cost in problem.costs.items()}

    def build(self, candidate: str) -> Network:
        return Network(candidate, self.config.space.stem, self.config.space.features, self.config.classes)

    def winner(self) -> Winner:
        network, problem = self.solve()
        config, parts = self.config, self._parts(network)
        architecture, structure = config.space.architecture(*parts), self._structure(network)
        model = {"name": "binas", "structure": structure, "image_size": config.image_size}
        model |= {"stem": config.space.stem, "features": config.space.features}
        blocks = list(blocks_of(config.space, config.image_size, architecture))
        weights = self.accuracy.supernet.weights_of(*parts)
        return Winner(
            structure, model, float(problem.value(network)), self._costs_of(network, problem), blocks, weights
        )
