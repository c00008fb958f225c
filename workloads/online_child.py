"""The evaluation of one checkpoint, in a process of its own, on one core, at low priority.

`python -m workloads.online_child RUN STEP HOME JOB PARENT` is that process; it does not outlive its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from workloads import catalog
from workloads.checkpoint_folder import latest_step
from workloads.log_file import segment, segments
from workloads.online import config_of, left, pinned
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_training import Resources

logger = logging.getLogger("workloads.online")  # in the process it would be __main__

LOOK_S = 0.5  # between two looks at the parent
NICENESS = 10  # training goes first where both want the core


def evaluate_checkpoint(run: RunFolder, step: int, home: Path, job_id: str) -> None:
    """Runs what is due on the pinned checkpoint of `step`, in this process; keeps each result as soon as it is there.

    Args:
        run: the job's folder, which holds its spec.
        step: of the checkpoint.
        home: where references to weights are looked up.
        job_id: written into the card.
    """
    from workloads.evaluation.base import Evaluation, Subject
    from workloads.export import export
    from workloads.place import Here

    spec = JobSpec.model_validate_json(run.spec.read_text())
    here = Here(Resources(), home, run.stop.exists)  # one core: the rest is for the training
    at = pinned(run, step)
    with run.logging("[online] "), _told(run, f"the checkpoint of step {step}"):
        if latest_step(at.checkpoints) != step:  # `export` would take the weights of the start
            raise FileNotFoundError(f"there is no checkpoint of step {step} in {at.checkpoints} any more")
        export(spec, at, home, job_id)
        epoch = next((p["epoch"] for p in run.read_metrics() if p["step"] == step), None)
        for entry in left(spec, run, step):
            named = spec.evaluate[entry]
            with _told(run, f"{named.name} of the checkpoint of step {step}"):
                evaluation: Evaluation = catalog.load("evaluation", named.name)()
                folder = at.path / "evaluations" / f"{entry}-{named.name}"
                subject = Subject(spec, at.artifact, home, folder, job_id, run.stop.exists, here)
                result = evaluation.run(config_of(named).without_baselines(), subject)
                if result is None:
                    return
                what = {"entry": entry, "label": result["label"], "metric": result["metric"]}
                value = result["results"]["pretrained"]
                run.add_online({"step": step, "epoch": epoch, **what, **value})
                logger.info("%s at step %d: %s %.4f", result["label"], step, result["metric"], value["mean"])


@contextlib.contextmanager
def _told(run: RunFolder, what: str) -> Iterator[None]:
    """An error becomes an event of the run."""
    try:
        yield
    except Exception as error:
        logger.exception("%s could not be evaluated", what)
        run.event("evaluation_failed", f"{what}: {type(error).__name__}: {error}")


def evaluate_apart(run: str, step: int, home: str, job_id: str) -> None:
    """`evaluate_checkpoint` in a process that does nothing else: it becomes slower than whatever else runs there."""
    import torch

    os.nice(NICENESS)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.INFO)
    evaluate_checkpoint(RunFolder(Path(run)), step, Path(home), job_id)


class ChildProcess:
    """An evaluation in a child of this process."""

    def __init__(self, run: RunFolder, step: int, home: Path, job_id: str) -> None:
        arguments = [str(run.path), str(step), str(home), job_id, str(os.getpid())]
        with open(segment(run.log, max(segments(run.log), default=0)), "ab") as log:
            # a group of its own: what it starts ends with it, and Ctrl-C at a terminal is for the training. No session
            # of its own: in that its priority would not count against the training
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workloads.online_child", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    def wait(self, timeout_s: float) -> bool:
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if code:
            raise RuntimeError(f"its process ended with {code}, see the log")
        return True

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def end_with(parent: int) -> None:
    """Ends this process and its group when its parent is no more `parent`: nobody else would, after a SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workloads.online_child", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the run folder")
    parser.add_argument("step", type=int, help="of a checkpoint that is pinned")
    parser.add_argument("home")
    parser.add_argument("job")
    parser.add_argument("parent", type=int, help="the process that this one ends with")
    arguments = parser.parse_args()
    end_with(arguments.parent)
    evaluate_apart(arguments.run, arguments.step, arguments.home, arguments.job)


if __name__ == "__main__":
    main()
