"""Evolution as the training-free searches do it: one child a turn, scored once, the best stay.

A turn draws a parent from the population and mutates it, again while the child is known, and is spent where the child
is over budget, or known still. Known are members and what is under way: none of them is scored again for a luckier
score, though what fell out of the population may be.

Where latency is measured, the first turns ask for nothing but that of the smallest networks: a budget that none of them
meets ends the search with what it would take. Beside the population the Pareto front is kept: what scored best for its
FLOPs, or for its milliseconds, though the population has long outgrown it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, cast

from numpy.random import Generator
from pydantic import Field

from workloads.search.base import Result, Search, SearchConfig
from workloads.search.budget import Budget
from workloads.search.latency_budget import NetworkLatency
from workloads.search.latency_ops import TableError
from workloads.search.pareto import Row, front, unique

DRAWS = 10  # of a turn while what it draws is known: around one or two members that is every second child


class EvolutionConfig(SearchConfig):
    """What evolutions have in common.

    Attributes:
        population: how many stay.
        iterations: turns, of each island; where latency is measured, behind those of the smallest networks.
        budget: what a network may cost.
        image_size: side of the images, of which FLOPs and latency are counted.
    """

    population: int = Field(default=256, ge=2)
    iterations: int = Field(default=96000, ge=1)
    budget: Budget
    image_size: int = Field(default=224, ge=8)

    def least(self) -> Mapping[str, float]:
        raise NotImplementedError(f"{type(self).__name__} must define least()")

    def problems(self, device: str) -> list[tuple[tuple[str | int, ...], str]]:
        latency = self.budget.latency
        said = [] if latency is None else latency.problems(device, self.image_size)
        try:
            return [(("budget", "latency"), problem) for problem in said] or self.budget.problems(self.least())
        except TableError as error:
            return [(("budget", "latency", "table"), str(error))]


class Evolution(Search):
    """A subclass says where it starts, how a child is made, what it costs and what it scores."""

    islands = True

    def __init__(self, config: Any, inputs: Any) -> None:
        super().__init__(config, inputs)
        self._members: list[Row] = []
        self._under_way: dict[int, str] = {}
        self._costs = lru_cache(maxsize=1024)(self.costs)  # asked for when a candidate is made, and when it is told
        self._fastest_ms = math.inf
        self._turns = self.total  # of all islands that were merged
        self._fronts: dict[str, list[Row]] = {"flops": [], "latency_ms": []}

    @abstractmethod
    def first_child(self, random: Generator) -> str:
        """A candidate while the population is small."""

    @abstractmethod
    def child(self, parent: str, random: Generator) -> str:
        """A mutation of a member."""

    @abstractmethod
    def rate(self, candidate: str, index: int) -> float:
        """The score."""

    @abstractmethod
    def latency_ms(self, latency: NetworkLatency, candidate: str) -> float:
        """What `latency` says of the candidate."""

    @abstractmethod
    def costs(self, candidate: str) -> dict[str, float]:
        """Parameters, flops and layers, counted."""

    @abstractmethod
    def smallest(self) -> list[str]:
        """The candidates of which one should be the fastest of the space."""

    @property
    def few(self) -> int:
        """Up to so many members children come from the start rather than from a member."""
        return min(10, self.config.population // 2)

    @property
    def total(self) -> int:
        iterations: int = self.config.iterations
        return len(self.probes) + iterations

    @cached_property
    def probes(self) -> list[str]:
        """Candidates of the first turns, of which nothing but the latency is asked."""
        latency = self.config.budget.latency
        if latency is None or latency.table is not None:
            return []
        return [candidate for candidate in self.smallest() if self.config.budget.met(self._costs(candidate))]

    def ask(self, index: int) -> str | None:
        if index < len(self.probes):
            return self.probes[index]
        random, known = self.random(index), {*self._under_way.values(), *(row["candidate"] for row in self._members)}
        drawn = (self.turn(index - len(self.probes), random) for _ in range(DRAWS))
        child = next((one for one in drawn if one not in known), None)
        if child is None or not self.config.budget.met(self._costs(child)):
            return None
        self._under_way[index] = child
        return child

    def turn(self, number: int, random: Generator) -> str:
        """What is drawn, whether it will do or not."""
        if len(self._members) <= self.few:
            return self.first_child(random)
        return self.child(self._members[random.integers(len(self._members))]["candidate"], random)

    def score(self, candidate: str, index: int) -> Result:
        found = {}
        if self._latency is not None:
            found["latency_ms"] = self.latency_ms(self._latency, candidate)
            if index < len(self.probes) or found["latency_ms"] > self._latency.budget.ms:
                return found
        return found | {"score": self.rate(candidate, index)}

    @cached_property
    def _latency(self) -> NetworkLatency | None:
        budget = self.config.budget.latency
        return None if budget is None else NetworkLatency(budget, self.config.image_size)

    def tell(self, index: int, candidate: str, result: Result) -> None:
        self._under_way.pop(index, None)
        self._fastest_ms = min(self._fastest_ms, result.get("latency_ms", math.inf))
        if index == len(self.probes) - 1 and self.config.budget.latency.ms < self._fastest_ms < math.inf:
            raise ValueError(
                f"got latency: {self.config.budget.latency.ms:g} ms, expected more than {self._fastest_ms:.4g}, which "
                f"the fastest of the {len(self.probes)} smallest networks took; allow as much"
            )
        if math.isfinite(result.get("score", math.nan)):
            island = self.inputs.island
            self._add({"candidate": candidate, "index": index, "island": island, **self._costs(candidate), **result})

    def immigrate(self, row: Row) -> None:
        self._add(row)

    def _add(self, row: Row) -> None:
        if any(row["candidate"] == member["candidate"] for member in self._members):
            return
        self._members.append(row)
        for cost, rows in self._fronts.items():
            self._fronts[cost] = front([*rows, row], cost)
        if len(self._members) > self.config.population:
            self._members.remove(min(self._members, key=lambda member: cast(float, member["score"])))

    def state(self) -> Any:
        fastest = None if self._fastest_ms == math.inf else self._fastest_ms
        under_way = [[index, candidate] for index, candidate in self._under_way.items()]
        return {"members": self._members, "fronts": self._fronts, "fastest_ms": fastest, "under_way": under_way}

    def restore(self, state: Any) -> None:
        self._members, self._fronts = list(state["members"]), dict(state["fronts"])
        self._fastest_ms = math.inf if state["fastest_ms"] is None else state["fastest_ms"]
        self._under_way = {index: candidate for index, candidate in state.get("under_way", [])}

    def population(self) -> list[Row]:
        return sorted(self._members, key=lambda row: -row["score"])

    def networks(self) -> list[Row]:
        return unique([*self._members, *(row for rows in self._fronts.values() for row in rows)])

    def merge(self, others: Sequence[Search]) -> None:
        islands = [self, *(cast(Evolution, other) for other in others)]
        self._turns = sum(island.total for island in islands)
        self._fastest_ms = min(island._fastest_ms for island in islands)
        self._members = unique(row for island in islands for row in island._members)
        for cost in self._fronts:
            self._fronts[cost] = unique(row for island in islands for row in island._fronts[cost])

    def costs_of(self, row: Row) -> dict[str, float]:
        """What a winner says of itself."""
        names = (*self.costs(row["candidate"]), "latency_ms")
        return {name: row[name] for name in names if name in row}

    def best(self) -> Row:
        """Raises ValueError where no candidate was within budget."""
        if not self._members:
            fastest = "" if self._fastest_ms == math.inf else f", of which the fastest took {self._fastest_ms:.4g} ms"
            raise ValueError(
                f"got no network within {self.config.budget.model_dump(exclude_none=True)} by {self._turns} candidates"
                f"{fastest}, expected one; allow more, or more iterations"
            )
        return self.population()[0]
