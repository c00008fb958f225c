"""A loop that makes no step: its stacks are written, and the process ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from workloads.checkpoint import Checkpoints
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.train import train
from workloads.watchdog import GRACE_S, HUNG, Watchdog

LIMIT_S = 100.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A watchdog whose clock goes only when told to, looked at as the thread would."""

    def __init__(self, folder: Path, limit_s: float | None = LIMIT_S, rank: int = 0) -> None:
        self.clock, self.ended = Clock(), 0
        self.file = folder / f"stacks-rank{rank}.txt"
        self.dog = Watchdog(limit_s, self.file, rank=rank, on_hang=self._end, clock=self.clock)

    def _end(self) -> None:
        self.ended += 1

    def idle(self, seconds: float, wait_s: float = 5.0) -> Watched:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + wait_s)
            self.dog.check()
        if self.dog._telling is not None:
            self.dog._telling.join()
        return self

    @property
    def stacks(self) -> str:
        return self.file.read_text() if self.file.exists() else ""


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_beats_keep_it_quiet(watched: Watched) -> None:
    for step in range(20):
        watched.dog.beat(step)
        watched.idle(LIMIT_S - 1)
    assert not watched.stacks and not watched.ended


def test_stacks_first_and_the_end_after_all_ranks_wrote_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(tmp_path, rank=3)
    watched.dog.beat(12)
    watched.idle(LIMIT_S)
    assert "rank 3 made no step for 100 s after step 12" in watched.stacks
    assert "_tell" in watched.stacks and "test_stacks_first" in watched.stacks  # all threads
    assert "guards.hang" in caplog.text
    watched.idle(GRACE_S - 1)
    assert not watched.ended
    watched.idle(1)
    assert watched.ended == 1
    assert watched.stacks.count("made no step") == 1


def test_a_late_step_is_no_hang(watched: Watched) -> None:
    watched.idle(LIMIT_S + GRACE_S - 1)
    watched.dog.beat(1)
    watched.idle(LIMIT_S - 1)
    assert watched.stacks.count("made no step") == 1 and not watched.ended
    watched.idle(1)
    assert watched.stacks.count("made no step") == 2  # appended


def test_pauses_nest_and_are_followed_by_a_whole_limit(watched: Watched) -> None:
    watched.idle(LIMIT_S - 1)
    with watched.dog.paused():
        with watched.dog.paused():
            watched.idle(10 * LIMIT_S)
        watched.idle(10 * LIMIT_S)
    watched.idle(LIMIT_S - 1)
    assert not watched.stacks
    watched.idle(1)
    assert watched.stacks


@pytest.mark.parametrize("stopped", [False, True])
def test_the_last_write_may_take_long(
    toy_job: Callable[..., JobSpec], watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    wait, takes_s = Checkpoints.wait, iter([10 * LIMIT_S, 0])  # in the loop; when it is left, and nobody watches

    def long(self: Checkpoints) -> None:
        watched.idle(next(takes_s))
        wait(self)

    monkeypatch.setattr(Checkpoints, "wait", long)
    monkeypatch.setattr("workloads.monitor.Watchdog", lambda *_, **__: watched.dog)
    job = toy_job(epochs=None, steps=2)
    assert train(job, RunFolder(tmp_path / "run"), tmp_path, should_stop=lambda: stopped) is not stopped
    assert not watched.stacks and not watched.ended


def test_a_process_that_stood_still_is_not_hung(watched: Watched) -> None:
    watched.idle(1000 * LIMIT_S, wait_s=1000 * LIMIT_S)  # Ctrl-Z over night, then one look
    watched.idle(LIMIT_S - 1)
    assert not watched.stacks
    watched.idle(LIMIT_S)
    assert watched.ended


def test_without_limit_nothing_is_watched(tmp_path: Path) -> None:
    watched = Watched(tmp_path, limit_s=None)
    with watched.dog, watched.dog.paused():
        watched.dog.beat(1)
    watched.idle(1e5)
    assert not watched.stacks and not watched.ended


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_ends_though_stacks_cannot_be_written(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "gone")
    watched.idle(LIMIT_S + GRACE_S)
    assert watched.ended


HANGS = """
import sys, threading
from pathlib import Path
import workloads.watchdog as watchdog

watchdog.GRACE_S = 0.1

def waits_for_ever():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

with watchdog.Watchdog(0.2, Path(sys.argv[1])) as dog:
    dog.beat(7)
    waits_for_ever()
"""


def test_a_real_hang_is_ended(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks-rank0.txt"
    done = subprocess.run([sys.executable, "-c", HANGS, str(stacks)], timeout=60, capture_output=True, text=True)
    assert done.returncode == HUNG, done.stderr
    text = stacks.read_text()
    assert "after step 7" in text and "in waits_for_ever" in text
    assert str(stacks) in done.stderr
