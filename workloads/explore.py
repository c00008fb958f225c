"""The loop of a search: candidates are scored in chunks until all are told. `workloads.ray_explore` spreads it.

What survives is `<run>/search/island-<n>.json`, replaced by rename every few seconds and when the job is stopped.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from workloads import catalog, weights
from workloads.assemble import open_stream
from workloads.data.allocator import keep_freed_memory
from workloads.metrics import MetricsWriter, OnPoint
from workloads.record import RunFolder, write_atomic
from workloads.search.base import Result, Search, SearchInputs
from workloads.search.island import Island
from workloads.spec_search import SearchSpec

logger = logging.getLogger(__name__)

CHUNK_S = 0.2  # of scoring: what is sent about and looked at costs little beside it
SAVE_S = 5.0
POINT_S = 1.0
TOLD = 3  # failures that become events of the job; the log has all
GIVE_UP = 20  # candidates that failed, and none that did not: it is not the candidates


class ScoresFailed(RuntimeError):
    """Nothing could be scored."""

    hint = "the log has the whole errors; a smaller batch_size or image_size helps where memory is short"


@dataclass
class Scored:
    """A chunk that was measured."""

    results: dict[int, Result]
    seconds: float
    errors: list[str] = field(default_factory=list)


def search_of(spec: SearchSpec, home: Path, device: torch.device, island: int = 0) -> Search:
    """The search that a spec names; opens nothing yet."""
    cls: type[Search] = catalog.load("search", spec.search.name)

    def start(model: torch.nn.Module) -> None:
        if spec.init is None:
            raise ValueError(f"got no init:, expected the weights that {spec.search.name} starts from; name a job's")
        for note in weights.load_initial(model, spec.init, home):
            logger.info("init: %s", note)

    inputs = SearchInputs(spec.seed, island, device, lambda name: open_stream(spec.data[name]), start)
    return cls(cls.Config.model_validate(spec.search.config), inputs)


def score(search: Search, chunk: Sequence[tuple[int, str]]) -> Scored:
    """Measures candidates; one that fails has no score, as one that is over budget; nor one whose numbers are none."""
    since = time.perf_counter()
    results: dict[int, Result] = {}
    errors: list[str] = []
    for index, candidate in chunk:
        try:
            results[index] = search.score(candidate, index)
            if not all(map(math.isfinite, results[index].values())):
                raise ArithmeticError(f"got {results[index]}, expected finite numbers; take settings less extreme")
        except (RuntimeError, ValueError, ArithmeticError) as error:  # memory is a RuntimeError
            logger.warning("candidate %d could not be scored: %s", index, candidate, exc_info=not errors)
            errors.append(f"{type(error).__name__}: {error}")
            results[index] = {}
    return Scored(results, time.perf_counter() - since, errors)


class Pool(Protocol):
    """Processes that score."""

    @property
    def slots(self) -> int:
        """Chunks that may be under way."""

    def submit(self, chunk: Sequence[tuple[int, str]]) -> None:
        """Begins with a chunk."""

    def next(self) -> Scored | None:
        """Waits for a chunk that is done; None after a while without."""


class Own:
    """The process itself."""

    slots = 1

    def __init__(self, search: Search) -> None:
        self._search = search

    def submit(self, chunk: Sequence[tuple[int, str]]) -> None:
        self._chunk = chunk

    def next(self) -> Scored:
        return score(self._search, self._chunk)


class Explorer:
    """An island and the processes that score for it.

    Attributes:
        busy_s: that these processes have scored, all together.
    """

    def __init__(self, island: Island, pool: Pool, on_error: Callable[[str], None] = logger.warning) -> None:
        self.island, self._pool, self._on_error = island, pool, on_error
        self._under_way = self._failed = self._scored = 0
        self._score_s: float | None = None  # of a candidate, of late
        self.busy_s = 0.0

    def go(self, until: Callable[[], bool]) -> None:
        """Until all are told, or `until` says so; it is asked after each chunk. What is under way then stays so.

        Raises:
            ScoresFailed: each of the first candidates failed.
        """
        while not self.island.done:
            while self._under_way < self._pool.slots and (chunk := self.island.take(self._chunk())):
                self._pool.submit(chunk)
                self._under_way += 1
            if (scored := self._pool.next()) is not None:
                self._take(scored)
            if until():
                return

    def _chunk(self) -> int:
        if self._score_s is None:
            return 1
        return min(max(1, round(CHUNK_S / self._score_s)), max(1, self.island.search.ahead // self._pool.slots))

    def _take(self, scored: Scored) -> None:
        self._under_way -= 1
        n = len(scored.results)
        self.busy_s += scored.seconds
        seconds = scored.seconds / n
        self._score_s = seconds if self._score_s is None else 0.8 * self._score_s + 0.2 * seconds
        for said in scored.errors[: max(0, TOLD - self._failed)]:
            self._on_error(said)
        self._failed += len(scored.errors)
        self._scored += n - len(scored.errors)
        if self._failed >= GIVE_UP and not self._scored:
            raise ScoresFailed(
                f"got no score by {self._failed} candidates, expected some; the last: {scored.errors[-1]}"
            )
        self.island.give(scored.results)


class IslandFile:
    """Where an island's state is kept."""

    def __init__(self, run: RunFolder, island: int) -> None:
        self.path = run.path / "search" / f"island-{island}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads(self.path.read_text())
            return state
        except FileNotFoundError:
            return None

    def write(self, island: Island) -> None:
        write_atomic(self.path, json.dumps(island.state()))


def neighbour_of(island: int, islands: int) -> int:
    """Of a ring: the one whose best member comes over."""
    return (island - 1) % islands


def migrate(spec: SearchSpec, run: RunFolder, number: int, island: Island, told_before: int) -> None:
    """Takes the best of the neighbour over, where `migrate_every` was passed since `told_before`."""
    if spec.islands == 1 or island.told // spec.migrate_every == told_before // spec.migrate_every:
        return
    theirs = IslandFile(run, neighbour_of(number, spec.islands)).read()
    if theirs is None:
        return
    if theirs["best"] is not None:
        island.search.immigrate(theirs["best"])


def standing_of(state: dict[str, Any]) -> dict[str, Any]:
    """Where an island stands by its file, before it does anything."""
    best = state["best"] or {}
    return {"told": state["told"], "spent": state["spent"], "best": best.get("score"), "rate": 0.0, "share": 0.0}


def point_of(islands: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A point of the curve, from the `standing` of each island."""
    told, spent = (sum(one[name] for one in islands) for name in ("told", "spent"))
    best = [one["best"] for one in islands if one["best"] is not None]
    point = {
        "step": told,
        "epoch": 0,
        "best_score": max(best, default=None),
        "spent_share": round(spent / max(1, told), 4),
    }
    rate = sum(one["rate"] for one in islands)
    share = sum(one["share"] for one in islands) / len(islands)
    point |= {"candidates_per_s": round(rate, 2), "step_time_s": round(1 / rate, 6) if rate else None}
    return point | {"scoring_share": round(share, 4)}


class Turn:
    """What an island does between two points of the curve."""

    def __init__(self, explorer: Explorer, processes: int) -> None:
        self._explorer, self._processes = explorer, processes
        self._begin()

    def _begin(self) -> None:
        self._told, self._busy_s, self._since = self._explorer.island.told, self._explorer.busy_s, time.monotonic()

    def standing(self) -> dict[str, Any]:
        """What `point_of` needs: candidates told a second, the share of the time that the processes scored.

        A chunk counts where it is told. The next turn begins.
        """
        island, seconds = self._explorer.island, max(1e-9, time.monotonic() - self._since)
        best = island.best or {}
        busy_s = self._explorer.busy_s - self._busy_s
        standing = {
            "told": island.told,
            "spent": island.spent,
            "best": best.get("score"),
            "rate": (island.told - self._told) / seconds,
            "share": busy_s / seconds / self._processes,
        }
        self._begin()
        return standing


def explore(
    spec: SearchSpec,
    run: RunFolder,
    home: Path,
    device: torch.device,
    *,
    should_stop: Callable[[], bool],
    on_point: OnPoint,
) -> bool:
    """Searches in this process, island by island in turns, or goes on; False when it was stopped.

    Args:
        spec: the job.
        run: its folder.
        home: where references to weights are looked up.
        device: where candidates are scored.
        should_stop: polled after each chunk.
        on_point: gets each point of the curve.
    """
    torch.set_num_threads(spec.resources.cpus_per_worker)
    keep_freed_memory()
    files = [IslandFile(run, number) for number in range(spec.islands)]
    explorers = []
    for number, file in enumerate(files):
        island = Island(search_of(spec, home, device, number))
        if (state := file.read()) is not None:
            island.restore(state)
        explorers.append(Explorer(island, Own(island.search), lambda said: run.event("score_failed", said)))
    write_atomic(run.total_steps, str(sum(one.island.search.total for one in explorers)))
    writer = MetricsWriter(run.metrics)
    saved = time.monotonic()
    turns = [Turn(one, 1) for one in explorers]
    try:
        while not all(one.island.done for one in explorers) and not should_stop():
            before = [one.island.told for one in explorers]
            for number, one in enumerate(explorers):
                until = time.monotonic() + POINT_S
                one.go(lambda until=until: time.monotonic() > until or should_stop())  # type: ignore[misc]
                migrate(spec, run, number, one.island, before[number])
            if [one.island.told for one in explorers] != before:
                point = point_of([turn.standing() for turn in turns])
                writer.append(point)
                on_point(point)
            if time.monotonic() - saved > SAVE_S:
                _save(files, explorers)
                saved = time.monotonic()
    finally:
        _save(files, explorers)
        writer.close()
    return all(one.island.done for one in explorers)


def _save(files: Sequence[IslandFile], explorers: Sequence[Explorer]) -> None:
    for file, one in zip(files, explorers, strict=True):
        file.write(one.island)
