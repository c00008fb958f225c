"""The adapter to Ray Tune: an island is a trial, which scores on its own or over a pool of actors.

A trial costs seconds and a score milliseconds, so there are a few trials for a whole search. Tune starts a trial again
whose worker or node died; it goes on from the checkpoint that it reported last, or from the island's own file where
that is newer. When the process that runs the job was killed, the next attempt restores Tune's run; when it was asked
to stop, the islands' files are all that is left, and all that is needed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from workloads import log_lines
from workloads.data.allocator import keep_freed_memory
from workloads.data.shards import DataError
from workloads.explore import (
    Explorer,
    IslandFile,
    Own,
    Pool,
    Scored,
    ScoresFailed,
    Turn,
    migrate,
    point_of,
    score,
    search_of,
    standing_of,
)
from workloads.journal import FailedForGoodError
from workloads.metrics import MetricsWriter
from workloads.place import device
from workloads.ray_group import fatal, give_up
from workloads.record import RunFolder, write_atomic
from workloads.search.island import Island
from workloads.spec_search import SearchSpec

logger = logging.getLogger(__name__)

MAX_FAILURES = 20  # of an island's process: Tune counts over its whole life, and spot nodes come and go
FIRST_S, REPORT_S = 0.5, 5.0  # to an island's first checkpoint, and between later ones, each of which takes it 15 ms
LOOK_S = 1.0  # whether the job was stopped, while no score comes
STATE = "island.json"
FINAL = (ScoresFailed, DataError, ValueError)
"""Would happen again."""


class SearchFailedError(FailedForGoodError):
    """An island failed for good."""


def explore_on_ray(spec: SearchSpec, run: RunFolder, home: Path, *, connected: Callable[[], None]) -> bool:
    """Searches on the cluster, or goes on; False when it was stopped.

    Args:
        spec: the job.
        run: its folder, on storage that all nodes see.
        home: where references to weights are looked up.
        connected: called after `ray.init`, which replaces signal handlers.

    Raises:
        SearchFailedError: an island failed for good.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C asks the islands for their state
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # CSV, JSON and TensorBoard: the run folder has the curve
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    connected()
    fatal(run).unlink(missing_ok=True)
    total = search_of(spec, home, torch.device("cpu")).total * spec.islands
    write_atomic(run.total_steps, str(total))
    folder = run.path / "tune"
    while True:
        results = _tuner(spec, run, home, folder).fit()
        if fatal(run).exists():
            raise SearchFailedError(**json.loads(fatal(run).read_text()))
        if results.errors:
            lost = str(results.errors[0]).strip().splitlines()[-1]
            raise SearchFailedError(
                f"an island ended {MAX_FAILURES + 1} times: {lost}", "see log.txt, then resume the job"
            )
        shutil.rmtree(folder)  # for Tune it is over, also where it was stopped
        told = sum((IslandFile(run, number).read() or {"told": 0})["told"] for number in range(spec.islands))
        if told == total or run.stop.exists():
            return told == total


def _tuner(spec: SearchSpec, run: RunFolder, home: Path, folder: Path) -> tune.Tuner:
    """Tune's run of an attempt that was killed, else a new one."""
    trainable = tune.with_resources(island, _resources(spec))
    if tune.Tuner.can_restore(str(folder / run.path.name)):
        run.event("search_restored", "the process that ran the search was gone; its islands go on")
        return tune.Tuner.restore(str(folder / run.path.name), trainable, resume_unfinished=True, resume_errored=True)
    shutil.rmtree(folder, ignore_errors=True)
    told = {"spec": spec.model_dump_json(), "run": str(run.path), "home": str(home)}
    return tune.Tuner(
        trainable,
        param_space={"island": tune.grid_search(list(range(spec.islands))), **told},
        run_config=tune.RunConfig(
            name=run.path.name,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            callbacks=[Curve(str(run.path), spec.islands)],
            verbose=0,
        ),
    )


def _scorers(spec: SearchSpec) -> int:
    """Of each island."""
    return spec.resources.max_workers // spec.islands


def _resources(spec: SearchSpec) -> tune.PlacementGroupFactory:
    """A trial that scores on its own holds what a worker has; one that has scorers needs nothing itself."""
    of_one = {"CPU": float(spec.resources.cpus_per_worker), "GPU": float(spec.resources.gpus_per_worker)}
    of_one |= spec.resources.custom_per_worker
    scorers = _scorers(spec)
    return tune.PlacementGroupFactory([of_one] if scorers == 1 else [{}, *[of_one] * scorers], strategy="PACK")


class Curve(tune.Callback):
    """Adds what islands report to the curve of the job, in the process that runs it."""

    def __init__(self, run: str, islands: int) -> None:
        self._run, self._number = run, islands
        self._islands: dict[int, dict[str, Any]] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if not self._islands:  # an attempt that goes on: the curve must not fall to what reports first
            files = {number: IslandFile(RunFolder(Path(self._run)), number).read() for number in range(self._number)}
            self._islands = {number: standing_of(state) for number, state in files.items() if state is not None}
        self._islands[result["config"]["island"]] = result
        writer = MetricsWriter(RunFolder(Path(self._run)).metrics)
        writer.append(point_of([*self._islands.values()]))
        writer.close()


def island(config: dict[str, Any]) -> None:
    """What a trial runs."""
    spec, run = SearchSpec.model_validate_json(config["spec"]), RunFolder(Path(config["run"]))
    log_lines.from_environment(job_id=run.path.name)
    with run.logging(f"[island {config['island']}] "):
        try:
            _island(spec, run, Path(config["home"]), config["island"])
        except FINAL as error:
            logger.exception("island %d failed", config["island"])
            give_up(run, f"{type(error).__name__}: {error}", getattr(error, "hint", None))
            run.stop.touch()  # for the other islands


def _island(spec: SearchSpec, run: RunFolder, home: Path, number: int) -> None:
    file = IslandFile(run, number)
    this = Island(search_of(spec, home, _device(spec), number))
    if (state := _newest(file)) is not None:
        this.restore(state)
    explorer = Explorer(this, _pool(spec, home, number, this), lambda said: run.event("score_failed", said))
    pause, turn = FIRST_S, Turn(explorer, _scorers(spec))
    while not this.done and not run.stop.exists():
        until, told = time.monotonic() + pause, this.told
        explorer.go(lambda until=until: time.monotonic() > until or run.stop.exists())  # type: ignore[misc]
        migrate(spec, run, number, this, told)
        file.write(this)
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(file.path, Path(scratch) / STATE)
            tune.report(turn.standing(), checkpoint=tune.Checkpoint.from_directory(scratch))
        pause = min(2 * pause, REPORT_S)


def _newest(file: IslandFile) -> dict[str, Any] | None:
    """The island's state by its own file or by Tune's checkpoint, whichever is further."""
    found = [state for state in (file.read(),) if state is not None]
    if (checkpoint := tune.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            found.append(json.loads((Path(folder) / STATE).read_text()))
    return max(found, key=lambda state: state["told"], default=None)


def _device(spec: SearchSpec) -> torch.device:
    """Of a process that scores, which may now use as many threads as it has cores."""
    torch.set_num_threads(spec.resources.cpus_per_worker)
    keep_freed_memory()
    of_one: torch.device = device(spec.resources)
    return of_one


def _pool(spec: SearchSpec, home: Path, number: int, this: Island) -> Pool:
    if _scorers(spec) == 1:
        return Own(this.search)
    return Actors(spec, home, number, _scorers(spec))


class Scorer:
    """Scores, in a process of its own; what it is asked again after it died it answers alike."""

    def __init__(self, spec: str, home: str, island: int) -> None:
        parsed = SearchSpec.model_validate_json(spec)
        self._search = search_of(parsed, Path(home), _device(parsed), island)

    def score(self, chunk: Sequence[tuple[int, str]]) -> Scored:
        return score(self._search, chunk)


class Actors:
    """Scorers in the trial's placement group; two chunks each, so that none waits for the next."""

    def __init__(self, spec: SearchSpec, home: Path, island: int, count: int) -> None:
        of_one = spec.resources
        actor = ray.remote(
            num_cpus=of_one.cpus_per_worker,
            num_gpus=of_one.gpus_per_worker,
            resources=of_one.custom_per_worker,
            max_restarts=-1,
            max_task_retries=-1,
        )(Scorer)
        self._actors: list[Any] = [actor.remote(spec.model_dump_json(), str(home), island) for _ in range(count)]
        self._under_way: dict[Any, int] = {}

    @property
    def slots(self) -> int:
        return 2 * len(self._actors)

    def submit(self, chunk: Sequence[tuple[int, str]]) -> None:
        busy = list(self._under_way.values())
        idlest = min(range(len(self._actors)), key=busy.count)
        self._under_way[self._actors[idlest].score.remote(chunk)] = idlest

    def next(self) -> Scored | None:
        done, _ = ray.wait(list(self._under_way), timeout=LOOK_S)
        if not done:
            return None
        del self._under_way[done[0]]
        scored: Scored = ray.get(done[0])
        return scored
