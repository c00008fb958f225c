"""Faults that need no cluster: what is done to a job, at moments that a seed decides, and what may come of it."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults.table import Row
from tests.faults.trial import Trial, Weights, final_weights, same
from tests.s3 import S3
from tests.waiting import until
from workloads.run import FAILED

SEED = os.environ["FAULTS_SEED"]  # of the whole run: see tests/conftest.py
STEPS, EVERY = 150, 10  # of the job: its length, and the steps between two checkpoints


@dataclass(frozen=True)
class Fault:
    """What is done to a job.

    Attributes:
        name: in the table.
        inject: starts the job and does it, and says how often; what is left of the job is finished afterwards.
        may_lose: steps, each time: those since the newest checkpoint, and since the one before while it is written.
        check: what else must hold of the finished job.
    """

    name: str
    inject: Callable[[Trial, random.Random], int]
    may_lose: int = 2 * EVERY
    check: Callable[[Trial], None] = lambda _: None

    def happens_to(self, trial: Trial, rng: random.Random, expected: Weights) -> Row:
        """The job from its start to its end.

        Raises:
            AssertionError: with what the drivers said.
        """
        injected = self.inject(trial, rng)
        trial.finish()
        row = Row(self.name, injected, True, trial.lost(), same(expected, final_weights(trial.run)))
        assert row.equal, f"{self.name}: other weights than those of an uninterrupted run; {trial.said()}"
        assert row.lost <= self.may_lose * injected, f"{self.name}: {row.lost} steps lost; {trial.said()}"
        starts = trial.starts()
        assert all(began == newest for began, newest in starts), f"{self.name}: sealed steps were made again: {starts}"
        self.check(trial)
        return row


def kill_drivers(trial: Trial, rng: random.Random) -> int:
    for _ in range(2):
        driver = trial.start()
        trial.after(rng.randrange(1, STEPS // 3), rng)
        trial.kill(driver)
    return 2


def fill_disk(trial: Trial, rng: random.Random) -> int:
    """The kernel cuts each write off, of checkpoints at first and then of every file: EFBIG stands in for ENOSPC."""
    for most_bytes in (64 << 10, 0):
        driver = trial.start()
        trial.after(rng.randrange(1, STEPS // 3), rng)
        resource.prlimit(driver.pid, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        assert trial.code(driver) == FAILED, trial.said()
        if most_bytes:
            record = trial.run.read_record()
            assert record is not None and record.state == "FAILED" and record.reason and record.hint
            assert "could not be written" in record.reason and "free disk space" in record.hint
    return 2


def truncate_newest(trial: Trial, rng: random.Random) -> int:
    def cut(data: bytearray) -> None:
        del data[rng.randrange(len(data)) :]

    return _damage(trial, rng, cut)


def flip_a_bit_of_newest(trial: Trial, rng: random.Random) -> int:
    def flip(data: bytearray) -> None:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    return _damage(trial, rng, flip)


def _damage(trial: Trial, rng: random.Random, change: Callable[[bytearray], None]) -> int:
    driver = trial.start()
    trial.after(rng.randrange(4 * EVERY, STEPS - 4 * EVERY), rng)
    trial.kill(driver)
    newest = trial.run.checkpoints / (trial.run.checkpoints / "latest").read_text().strip()
    data = bytearray(newest.read_bytes())
    change(data)
    newest.write_bytes(data)
    return 1


def says_what_was_damaged(trial: Trial) -> None:
    said = [event["message"] for event in trial.run.read_events() if event["kind"] == "checkpoint_passed_over"]
    record = trial.run.read_record()
    assert len(said) == 1 and "is damaged" in said[0] and "continued from step" in said[0], said
    assert record is not None and said[0] in record.warnings


def submit_twice(trial: Trial, rng: random.Random) -> int:
    """Both start at once; the one that trains stands still until the other has given up."""
    drivers = [trial.start(), trial.start()]
    moment = rng.randrange(STEPS // 2)
    until(lambda: trial.steps() > moment, "one of them trains")
    record = trial.run.read_record()
    assert record is not None
    (runs,) = [driver for driver in drivers if driver.pid == record.pid]
    (waits,) = [driver for driver in drivers if driver.pid != record.pid]
    os.kill(runs.pid, signal.SIGSTOP)
    try:
        until(lambda: _stands_still(runs), "the run that trains stops")
        before = _written(trial)
        assert trial.code(waits) == FAILED, trial.said()
        assert _written(trial) == before, "a run that was refused wrote into the folder"
    finally:
        os.kill(runs.pid, signal.SIGCONT)
    assert "another process runs the job" in trial.said()
    return 1


def _stands_still(driver: BaseProcess) -> bool:
    """Whether each of its threads does, where the system tells: one that writes is stopped when it has written."""
    states = (stat.read_text().rpartition(") ")[2][0] for stat in Path("/proc").glob(f"{driver.pid}/task/*/stat"))
    return all(state == "T" for state in states)


def _written(trial: Trial) -> dict[Path, int]:
    """When each file of the run was written last, in ns."""
    return {path: path.stat().st_mtime_ns for path in trial.run.path.rglob("*") if path.is_file()}


def take_away(s3: S3, outage_s: float) -> Callable[[Trial, random.Random], int]:
    """The server of data and mirror goes away while the job reads and writes there."""

    def inject(trial: Trial, rng: random.Random) -> int:
        trial.start()
        trial.after(rng.randrange(1, STEPS // 2), rng)
        with s3.away():
            time.sleep(outage_s)
        return 1

    return inject


def mirror_is_complete(s3: S3) -> Callable[[Trial], None]:
    def check(trial: Trial) -> None:
        mirror = trial.spec.checkpoint.mirror
        assert mirror is not None
        with s3.store().open_input_file(f"{mirror.removeprefix('s3://')}/{trial.run.path.name}/latest") as file:
            assert file.readall() == (trial.run.checkpoints / "latest").read_bytes()

    return check


def s3_gone(s3: S3, outage_s: float) -> Fault:
    return Fault("S3 server gone", take_away(s3, outage_s), 0, mirror_is_complete(s3))


FAULTS = [
    Fault("driver SIGKILL", kill_drivers),
    *([Fault("disk full at checkpoint", fill_disk)] if sys.platform == "linux" else []),  # who has prlimit
    Fault("newest checkpoint truncated", truncate_newest, 3 * EVERY, says_what_was_damaged),
    Fault("newest checkpoint, a bit flipped", flip_a_bit_of_newest, 3 * EVERY, says_what_was_damaged),
    Fault("two submissions of one id", submit_twice, 0),
]
