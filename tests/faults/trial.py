"""One job in a folder of its own, run by drivers that faults happen to until one of them has finished it."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.faults.counted import drive
from tests.waiting import until
from workloads.record import RunFolder
from workloads.run import SUCCEEDED
from workloads.spec import JobSpec

TIMEOUT_S = 180.0

Weights = dict[str, torch.Tensor]

FORKS = multiprocessing.get_context("forkserver")  # which has torch already: a start of Python is most of a small job
IMPORTED_LATER = ["workloads.models.timm_import", "torch._dynamo", "pandas", "tensorboardX"]  # 0.5 to 2.5 s of a driver
FORKS.set_forkserver_preload(["tests.faults.counted", "workloads.train", "workloads.preflight", *IMPORTED_LATER])


def final_weights(run: RunFolder) -> Weights:
    newest = run.checkpoints / (run.checkpoints / "latest").read_text().strip()
    if newest.is_file():
        return torch.load(newest, weights_only=True)["method"]
    dcp_to_torch_save(newest, together := newest.with_suffix(".together"))  # of a method that is shared out
    tensors = torch.load(together, weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("method.")}


def same(expected: Weights, got: Weights) -> bool:
    """Bit for bit."""
    return expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


class Trial:
    """The files of the job, and the drivers that were started."""

    def __init__(self, spec: JobSpec, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        """Starts nothing.

        Args:
            spec: the job.
            folder: a new one.
            environment: of the drivers, beside that of this process.
        """
        folder.mkdir(parents=True)
        self.spec, self.folder, self.run = spec, folder, RunFolder(folder / "runs" / "job")
        self._job, self._steps = folder / "job.json", folder / "steps"
        self._job.write_text(spec.model_dump_json())
        assert spec.steps is not None
        self._steps.write_bytes(bytes(spec.steps))
        own = {"MANTA_HOME": str(folder), "MANTA_JOB_ID": "job", "XDG_CACHE_HOME": str(folder / "cache")}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_"))}
        self._environment = inherited | dict(environment or {}) | own
        self._drivers: list[BaseProcess] = []

    def lend(self, home: Path) -> None:
        """Makes the runs of another installation, which are teachers, runs of this one."""
        self.run.path.parent.mkdir()
        for run in (home / "runs").iterdir():
            (self.run.path.parent / run.name).symlink_to(run)

    def start(self) -> BaseProcess:
        """The driver of the next attempt."""
        number = len(self._drivers) + 1
        environment = self._environment | {"MANTA_ATTEMPT": str(number)}
        driver = FORKS.Process(target=drive, args=(self._job, environment, self.folder / f"driver-{number}.txt"))
        driver.start()
        self._drivers.append(driver)
        return driver

    def code(self, driver: BaseProcess) -> int | None:
        """The exit code of a driver, which ends by itself."""
        driver.join(TIMEOUT_S)
        assert driver.exitcode is not None, f"a driver did not end within {TIMEOUT_S:g} s; {self.said()}"
        return driver.exitcode

    def kill(self, driver: BaseProcess) -> None:
        driver.kill()
        driver.join()

    def after(self, steps: int, rng: random.Random) -> None:
        """Returns at some moment after so many more steps were made."""
        want = self.steps() + steps
        last = self._drivers[-1]
        until(
            lambda: self.steps() >= want or last.exitcode is not None,
            f"{steps} more steps of {self.folder}",
            pause_s=0.001,
        )
        assert last.exitcode is None, f"the driver ended before the fault, with {last.exitcode}; {self.said()}"
        time.sleep(rng.random() * 0.01)

    def steps(self) -> int:
        """How many were made so far, in all attempts."""
        return sum(self._steps.read_bytes())

    def finish(self) -> None:
        """Waits for the driver that runs, or for the next attempt, which must succeed."""
        running = [driver for driver in self._drivers if driver.is_alive()]
        code = self.code((running or [self.start()])[0])
        record = self.run.read_record()
        state = record and (record.state, record.reason)
        assert (code, state) == (SUCCEEDED, ("SUCCEEDED", None)), f"got {code}, {state}; {self.said()}"

    def lost(self) -> int:
        """Steps that were made again; that none was left out is checked too."""
        made = self._steps.read_bytes()
        assert all(made), f"steps were left out; how often each was made: {list(made)}"
        return sum(made) - len(made)

    def starts(self) -> list[tuple[int, int]]:
        """Of each attempt that trained: how many steps were done when it began, and at the newest whole checkpoint."""
        lines = (self.folder / "starts").read_text().splitlines()
        return [(int(began), int(newest)) for began, newest in map(str.split, lines)]

    def said(self) -> str:
        """The end of what each driver wrote."""
        logs = [self.folder / f"driver-{n + 1}.txt" for n in range(len(self._drivers))]
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)

    def close(self) -> None:
        for driver in self._drivers:
            self.kill(driver)


@contextmanager
def trial_of(spec: JobSpec, folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Trial]:
    """A trial whose drivers are killed at the end of the block."""
    trial = Trial(spec, folder, environment)
    try:
        yield trial
    finally:
        trial.close()
