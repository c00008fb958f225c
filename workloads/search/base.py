"""The interface of an architecture search: one paper, one file, one class.

A search proposes candidates (`ask`), somebody measures them (`score`), and it learns from what was measured (`tell`):

    ask(0), ask(1), ...     in order, each a function of the seed, the index, and what was told so far
    score(candidate, i)     anywhere, in any order: a function of the config, the candidate and the index, never of what
                            was told; a process that only scores builds the same object and calls nothing else
    tell(i, ...)            in order

`search.island` keeps that order whatever the number of processes, so that one seed gives one result, unless latency
is measured, which is never the same twice. What survives a restart is `state`, plain JSON. Nothing here knows of Ray,
of files or of other islands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from numpy.random import Generator, default_rng
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Result = dict[str, float]
"""What `score` measured of a candidate. Where there is a `score` it is what is maximised; without, the candidate turned
out to be over budget, or failed."""


class SearchConfig(BaseModel):
    """Beside its user, frozen; a typo in a job is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def problems(self, device: str) -> list[tuple[tuple[str | int, ...], str]]:
        """What fields cannot say by themselves: (where, got and expected), such as a budget that nothing can meet.

        Args:
            device: `cpu` or `cuda`: what the job's workers have. Takes about a second at most, on a machine without it.
        """
        return []

    def least(self) -> Mapping[str, float]:
        """The least that a candidate can have of each cost; `latency_ms` only where a table says it; {}: not known."""
        return {}


def _no_data(stream: str) -> Any:
    raise ValueError(
        f"got no stream {stream!r}, expected one for a search that looks at data; add data: {{{stream}: ...}}"
    )


def _no_weights(_: nn.Module) -> None:
    raise ValueError("got no init:, expected weights to start from; name those of a job")


@dataclass(frozen=True)
class SearchInputs:
    """All that a job hands over.

    Attributes:
        seed: of the job.
        island: its number; each draws other candidates.
        device: where `score` computes.
        open: name of a stream -> its `Manifest`.
        start: loads the weights that `init:` of the job names into a network.
    """

    seed: int = 0
    island: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    open: Callable[[str], Any] = _no_data
    start: Callable[[nn.Module], None] = _no_weights


@dataclass(frozen=True)
class Winner:
    """What a search found.

    Attributes:
        structure: as the paper writes it: a string, or JSON.
        model: `model:` of a JobSpec that builds it.
        score: that it won by.
        costs: parameters, flops (multiply-adds), layers, and what else is known: latency_ms, as its budget counts it.
        blocks: to draw it: `label`, `channels`, `size` (side of the maps behind it), `layers`, `stride` of each.
        weights: to start from, by the names of `model`; None: none were trained.
    """

    structure: str
    model: dict[str, Any]
    score: float
    costs: dict[str, float]
    blocks: list[dict[str, Any]]
    weights: dict[str, Tensor] | None = None


class Search(ABC):
    """One paper. `total` candidates are asked for; then `winner` has what was found."""

    Config: ClassVar[type[SearchConfig]]
    paper: ClassVar[str]  # "Zen-NAS, Lin et al. 2021, arXiv 2102.01063"
    streams: ClassVar[tuple[str, ...]] = ()  # of the job's data
    starts_from_weights: ClassVar[bool] = False  # `init:` must name some
    ahead: ClassVar[int] = 32  # candidates that are under way: later ones do not know their scores
    islands: ClassVar[bool] = False  # whether several of it may run beside each other and exchange members

    def __init__(self, config: Any, inputs: SearchInputs) -> None:
        """Cheap: whatever a process that scores needs beyond (networks, data) it makes at its first score."""
        self.config, self.inputs = config, inputs

    @property
    @abstractmethod
    def total(self) -> int:
        """Candidates in all."""

    @abstractmethod
    def ask(self, index: int) -> str | None:
        """Candidate `index`; None: that turn is spent, what was drawn is over budget or known."""

    @abstractmethod
    def score(self, candidate: str, index: int) -> Result:
        """Measures a candidate; index tells apart the noise of two measurements."""

    @abstractmethod
    def tell(self, index: int, candidate: str, result: Result) -> None:
        """Learns from a measurement."""

    @abstractmethod
    def state(self) -> Any:
        """All that was learned, as JSON values; with `restore` the search goes on as if it had not been away."""

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Takes over what `state` gave, maybe in another process."""

    @abstractmethod
    def population(self) -> list[dict[str, Any]]:
        """A row for each candidate that is kept: `candidate`, `index`, and what was measured; best first."""

    def networks(self) -> list[dict[str, Any]]:
        """Rows that Pareto fronts are drawn of: networks with a `score` and costs. Asked for once, at the end."""
        return self.population()

    @abstractmethod
    def build(self, candidate: str) -> nn.Module:
        """The network of a row of `networks`, with a classifier where latency counts it. Its weights mean nothing."""

    @abstractmethod
    def winner(self) -> Winner:
        """The best one.

        Raises:
            ValueError: there is none: no candidate met the budget.
        """

    def immigrate(self, row: dict[str, Any]) -> None:
        """Takes a row of the `population` of another island; of searches that have `islands`."""
        raise NotImplementedError(f"{type(self).__name__} has no islands")

    def merge(self, others: Sequence[Search]) -> None:
        """Takes over all that other islands found, to be asked for what all have: rows and the winner."""
        if others:
            raise NotImplementedError(f"{type(self).__name__} has no islands")

    def random(self, index: int) -> Generator:
        """For `ask`: the same numbers for the same candidate, in any process."""
        return default_rng((self.inputs.seed, self.inputs.island, index))

    def torch_random(self, index: int) -> torch.Generator:
        """For `score`, on its device."""
        seed = default_rng((self.inputs.seed, self.inputs.island, index, 1)).integers(2**62)
        return torch.Generator(self.inputs.device).manual_seed(int(seed))
