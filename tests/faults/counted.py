"""A driver as the service starts it, which also counts the steps that it makes."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import Any

from workloads import checkpoint_folder, ray_train
from workloads.record import RunFolder
from workloads.run import main
from workloads.step import Stepper


def count(home: Path) -> None:
    """Makes rank 0 of this process count how often each step is made, a byte a step in `home/steps`.

    Mapped memory: a SIGKILL takes nothing back, and a full disk stops no count. A line of `home/starts` has how many
    steps were done when it began, and what the newest whole checkpoint was then.
    """
    began = False
    with open(home / "steps", "r+b") as file:
        made = mmap.mmap(file.fileno(), 0)
    make = Stepper.__call__

    def counted(self: Stepper, streams: Any, progress: Any) -> Any:
        nonlocal began
        if self._ranks.rank == 0 and not began:
            began = True
            with open(home / "starts", "a") as starts:
                starts.write(f"{progress.step} {_newest_whole(RunFolder(home / 'runs' / 'job').checkpoints)}\n")
        done = make(self, streams, progress)
        if self._ranks.rank == 0:
            made[progress.step] += 1
        return done

    Stepper.__call__ = counted  # type: ignore[method-assign]


def _newest_whole(folder: Path) -> int:
    """Up to `latest`, where there is one: a kill between a seal and that leaves one that nobody goes on from."""
    latest = checkpoint_folder.latest_step(folder)
    sealed = [seal for seal in checkpoint_folder.seals(folder) if latest is None or seal.step <= latest]
    return max((seal.step for seal in sealed if checkpoint_folder.damage(folder, seal) is None), default=0)


def worker(*arguments: Any) -> None:
    """What Ray Train runs on each worker."""
    (run,) = (argument for argument in arguments if isinstance(argument, RunFolder))
    count(run.path.parents[1])
    ray_train.worker(*arguments)


def drive(job: Path, environment: dict[str, str], log: Path) -> None:
    """What `python -m workloads.run JOB` does in a process of its own.

    Args:
        job: the file of the spec.
        environment: all of it.
        log: gets what the process writes.
    """
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "wb", buffering=0) as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    count(Path(environment["MANTA_HOME"]))
    ray_train.WORKER = "tests.faults.counted:worker"
    sys.exit(main([str(job)]))
