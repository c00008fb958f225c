"""Runs as processes that a made-up Ray starts, and a Ray that forgets, lies, and dies in the middle of a call.

Beside what `tests.service.fakes` can do, a process takes the lock of its folder as `workloads.run` does, may outlive
its Ray, may fall silent and come back, and its last word may arrive late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.decisions import STALE_S
from service.errors import Unavailable
from service.ray_jobs import RayStatus, submission_id
from tests.service.fakes import FakeRay
from workloads.record import Record, RunFolder, RunState

AHEAD_S = 3600.0  # of the clock of a node that nobody set


class Crash(BaseException):
    """The service is killed; nothing in it may catch that."""


@dataclass
class Process:
    """One driver that Ray has started.

    Attributes:
        life: of Ray, in which it was started.
        beat: when it last wrote its record, by the clock of the service; None: not yet.
        locked: it has the lock of the folder.
        silent: it lives, but writes nothing: its disk hangs, say.
        skew: of the clock of its node.
    """

    job_id: str
    attempt: int
    life: int
    skew: float
    step: int = 0
    beat: float | None = None
    locked: bool = False
    silent: bool = False
    alive: bool = True


class LyingRay(FakeRay):
    """Ray's Jobs API over processes.

    Attributes:
        loses_answer: of the next submission, which it takes.
    """

    def __init__(
        self, point: Callable[[], None], between: Callable[[], None], started: Callable[[str, int], None]
    ) -> None:
        """Calls others.

        Args:
            point: before each call, and after it has changed something.
            between: while a call is on its way.
            started: gets job and attempt of a new process.
        """
        super().__init__(cpus=3)
        self._point, self._between, self._started = point, between, started
        self.loses_answer = False

    def _reach(self) -> None:
        self._point()
        self._between()
        super()._reach()

    def submit(self, job_id: str, attempt: int) -> None:
        before = len(self.submitted)
        super().submit(job_id, attempt)
        if len(self.submitted) > before:
            self._started(job_id, attempt)
        self._point()
        if self.loses_answer:
            self.loses_answer = False
            raise Unavailable("the connection broke")

    def stop(self, job_id: str, attempt: int) -> None:
        super().stop(job_id, attempt)
        self._point()


class Runs:
    """All processes, and what they write."""

    def __init__(self, ray: LyingRay, folder: Callable[[str], Path], clock: Callable[[], float]) -> None:
        self._ray, self._folder, self._clock = ray, folder, clock
        self.all: list[Process] = []
        self.life = 0
        self.late: dict[str, Record] = {}  # by job: written, but not to be seen yet
        self.wrote: dict[str, list[Record]] = {}  # by job: last words

    def living(self) -> list[Process]:
        return [process for process in self.all if process.alive]

    def known(self, job_id: str) -> bool:
        """Whether anybody could know that a process of the job is at work: Ray says so, or a fresh heartbeat."""
        now = self._clock()
        beats = [one.beat for one in self.living() if one.job_id == job_id and one.beat is not None]
        names = {submission_id(job_id, one.attempt) for one in self.all if one.job_id == job_id}
        return any(abs(now - beat) <= STALE_S for beat in beats) or any(
            self._ray.known.get(name) in ("PENDING", "RUNNING") for name in names
        )

    def has_succeeded(self, job_id: str) -> bool:
        """Whether its record says so."""
        record = RunFolder(self._folder(job_id)).read_record()
        return record is not None and record.state == "SUCCEEDED"

    def start(self, job_id: str, attempt: int, skew: float) -> None:
        self.all.append(Process(job_id, attempt, self.life, skew))

    def turn(self, process: Process, way: str) -> None:
        """What a process does next: it boots first; `work`, SUCCEEDED, FAILED, `die`, `silent`, or `late` SUCCEEDED."""
        run = RunFolder(self._folder(process.job_id))
        if way == "die":
            return self._end(process, "FAILED")
        process.silent = way == "silent"
        if process.silent:
            return None
        if not process.locked:
            return self._boot(process)
        if run.stop.exists():
            return self._say(process, "STOPPED")
        if way == "work":
            process.step += 1
            return self._write(process, "RUNNING")
        return self._say(process, "FAILED" if way == "FAILED" else "SUCCEEDED", late=way == "late")

    def _boot(self, process: Process) -> None:
        if any(one.locked for one in self.living() if one.job_id == process.job_id):
            return self._end(process, "FAILED")
        if any(record.state == "SUCCEEDED" for record in self.wrote.get(process.job_id, [])):
            return self._end(process, "SUCCEEDED")
        process.locked = True
        process.step = max(one.step for one in self.all if one.job_id == process.job_id)
        return self._write(process, "STARTING")

    def _say(self, process: Process, state: RunState, *, late: bool = False) -> None:
        self._write(process, state, late=late)
        self._end(process, "FAILED" if state == "FAILED" else "STOPPED" if state == "STOPPED" else "SUCCEEDED")

    def _write(self, process: Process, state: RunState, *, late: bool = False) -> None:
        self.deliver(process.job_id)
        now = self._clock() + process.skew
        ended = state not in ("STARTING", "RUNNING")
        record = Record(
            job_id=process.job_id,
            state=state,
            attempt=process.attempt,
            reason=f"reason {process.attempt}" if state == "FAILED" else None,
            started_at=now,
            updated_at=now,
            finished_at=now if ended else None,
            step=process.step,
            host="node-9",
        )
        process.beat = self._clock()
        if ended:
            self.wrote.setdefault(process.job_id, []).append(record)
        self.late[process.job_id] = record
        if not late:
            self.deliver(process.job_id)

    def deliver(self, job_id: str) -> None:
        """What was written becomes visible."""
        if (record := self.late.pop(job_id, None)) is not None:
            self._folder(job_id).mkdir(parents=True, exist_ok=True)
            RunFolder(self._folder(job_id)).record.write_text(record.model_dump_json())

    def _end(self, process: Process, status: RayStatus) -> None:
        process.alive = process.locked = False
        name = submission_id(process.job_id, process.attempt)
        if process.life == self.life and self._ray.known.get(name) == "RUNNING":
            self._ray.known[name] = status

    def new_head(self, survivors: Callable[[], bool]) -> None:
        """Ray forgets all; processes die with it, or go on until they end by themselves."""
        for process in self.living():
            if not survivors():
                process.alive = process.locked = False
        self.life += 1
        self._ray.known.clear()

    def clock_moved(self) -> None:
        """Within seconds each process that can writes its heartbeat, and what was late arrives."""
        for job_id in list(self.late):
            self.deliver(job_id)
        for process in self.living():
            if process.locked and not process.silent:
                self._write(process, "RUNNING" if process.step else "STARTING")
