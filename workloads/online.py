"""Evaluations of checkpoints while training goes on: which of them, when, and one at a time.

    newest checkpoint that is due -> pinned by hard links -> evaluated elsewhere -> a line each in `online.jsonl`

An entry of `evaluate` says by `every_checkpoints` which are due. Of those that become due while one is evaluated the
newest is next, and the others are left out. The numbers are those that the same evaluation gives for that checkpoint
at any other time. A failure is an event of the run, never its end. Elsewhere is a child (`workloads.online_child`) or
a task of a cluster (`workloads.ray_online`).
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from workloads import catalog
from workloads import checkpoint_folder as files
from workloads.record import RunFolder, online_names
from workloads.spec import JobSpec, Named
from workloads.trackers import Tracker, tensorboard

if TYPE_CHECKING:
    from workloads.evaluation.base import EvaluationConfig

logger = logging.getLogger(__name__)

POLL_S = 0.5  # between two looks: for a checkpoint, an end, a stop


class Evaluating(Protocol):
    """The evaluation of one checkpoint, which goes on elsewhere."""

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over; raises what a process that died, not an evaluation, failed with."""

    def end(self) -> None:
        """Ends it now, with all that it started."""


Start = Callable[[RunFolder, int, Path, str], Evaluating]
"""Starts `workloads.online_child.evaluate_checkpoint` of the same arguments."""


def due(spec: JobSpec, step: int) -> list[int]:
    """Entries of `spec.evaluate` that run on the checkpoint of `step`; a checkpoint between two of them is not due."""
    number, rest = divmod(step, spec.checkpoint.every_steps)
    if rest or not number:
        return []
    every = [config_of(named).every_checkpoints for named in spec.evaluate]
    return [i for i, n in enumerate(every) if n is not None and number % n == 0]


def left(spec: JobSpec, run: RunFolder, step: int) -> list[int]:
    """Those of them that have no result yet."""
    done = {(result["step"], result["entry"]) for result in run.read_online()}
    return [entry for entry in due(spec, step) if (step, entry) not in done]


def config_of(named: Named) -> EvaluationConfig:
    config: EvaluationConfig = catalog.load("evaluation", named.name).Config.model_validate(named.config)
    return config


def pinned(run: RunFolder, step: int) -> RunFolder:
    """Where the checkpoint of `step` and its encoder are while they are evaluated."""
    return RunFolder(run.path / "online" / files.stem(step))


def pin(checkpoints: Path, step: int, folder: Path) -> None:
    """Makes `folder` hold a checkpoint too, by hard links, so that it stays when it is removed from `checkpoints`.

    Raises:
        FileNotFoundError: it was removed already.
        OSError: it could not be linked nor copied.
    """
    seal = files.read_seal(checkpoints, step)
    if seal is None:
        raise FileNotFoundError(f"there is no checkpoint of step {step} in {checkpoints} any more")
    for name in seal.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(checkpoints / name, folder / name)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(checkpoints / name, folder / name)
    files.complete(folder, seal)


class OnlineEvaluations:
    """Context manager around the training: a thread that watches for checkpoints and has them evaluated one by one.

    When training ends, the one that goes on and the newest that is due are waited for; when it is stopped or fails,
    they are ended. A later attempt goes on behind what `online.jsonl` holds.
    """

    def __init__(self, spec: JobSpec, run: RunFolder, home: Path, job_id: str, start: Start) -> None:
        """Starts nothing.

        Args:
            spec: the job.
            run: its folder, which the process of `start` sees as well.
            home: where references to weights are looked up.
            job_id: of the job.
            start: starts an evaluation elsewhere.
        """
        self._spec, self._run, self._home, self._job_id, self._start = spec, run, home, job_id, start
        self._trained, self._abandoned = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._trackers: list[Tracker] = []

    def __enter__(self) -> OnlineEvaluations:
        shutil.rmtree(self._run.path / "online", ignore_errors=True)  # of an attempt that was killed
        if any(config_of(named).every_checkpoints for named in self._spec.evaluate):
            newest = max((result["step"] for result in self._run.read_online()), default=0)
            self._after = newest - 1 if left(self._spec, self._run, newest) else newest
            self._trackers = tensorboard(self._run.path / "tensorboard" / "online", self._after)
            self._thread = threading.Thread(target=self._watch, name="online evaluation", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        if kind is not None:
            self._abandoned.set()
        self._trained.set()
        try:
            self._thread.join()
        finally:  # Ctrl-C while it is waited for
            self._abandoned.set()
            self._thread.join()
            for tracker in self._trackers:
                tracker.close()

    def _watch(self) -> None:
        while not self._ended():
            trained = self._trained.is_set()  # asked first: the last checkpoint is still seen
            step = self._newest_due()
            if step is not None:
                self._evaluate(step)
            elif trained:
                return
            else:
                self._trained.wait(POLL_S)

    def _ended(self) -> bool:
        return self._abandoned.is_set() or self._run.stop.exists()

    def _newest_due(self) -> int | None:
        steps = (step for step in files.steps(self._run.checkpoints) if step > self._after)
        return next((step for step in steps if left(self._spec, self._run, step)), None)

    def _evaluate(self, step: int) -> None:
        every = self._spec.checkpoint.every_steps
        passed = sum(bool(due(self._spec, s)) for s in range(self._after // every * every + every, step, every))
        if passed:
            logger.info("%d checkpoints before step %d are not evaluated: they come too fast for that", passed, step)
        self._after = step
        folder = pinned(self._run, step)
        try:
            pin(self._run.checkpoints, step, folder.checkpoints)
            evaluating = self._start(self._run, step, self._home, self._job_id)
            while not evaluating.wait(POLL_S):
                if self._ended():
                    evaluating.end()
                    return
        except Exception as error:  # of whatever kind: it must not cost the run
            logger.warning("the checkpoint of step %d could not be evaluated", step, exc_info=True)
            self._run.event("evaluation_failed", f"the checkpoint of step {step}: {error}")
        finally:
            shutil.rmtree(folder.path, ignore_errors=True)
        results = self._run.read_online()
        names = online_names(results)
        values = {f"online/{names[result['entry']]}": result["mean"] for result in results if result["step"] == step}
        for tracker in self._trackers if values else ():
            tracker.point({"step": step} | values)
