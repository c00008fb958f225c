"""Keeps `record.json` true while a job runs: state, progress, skipped samples, how long it trained, a heartbeat.

The process that owns the job (not its workers) has the one Journal. A thread renews the
record from the files that workers append to, so no training step waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from workloads.record import HEARTBEAT_S, Record, RunFolder, RunState

logger = logging.getLogger(__name__)

_MAX_SKIPPED = 1000  # listed in the record; `skipped.txt` has all


class FailedForGoodError(RuntimeError):
    """Would come again, so it ends the job; its hint goes into the record."""

    def __init__(self, reason: str, hint: str | None) -> None:
        self.hint = hint
        super().__init__(reason)


class Journal:
    """Context manager: STARTING on entry, a heartbeat until exit; the owner sets the final state."""

    def __init__(
        self,
        run: RunFolder,
        job_id: str,
        attempt: int,
        *,
        max_duration: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Goes on from the record of the attempt before.

        Args:
            run: the folder.
            job_id: of the job.
            attempt: its number.
            max_duration: seconds of training over all attempts, after which the run is asked to stop; None: no limit.
            clock: seconds that never go back.

        Attributes:
            out_of_time: whether it was this limit, and nobody else before, that asked the run to stop.
        """
        now = time.time()
        before = run.read_record()
        self._run = run
        self._lock = threading.Lock()
        self._record = Record(
            job_id=job_id,
            state="STARTING",
            attempt=attempt,
            started_at=before.started_at if before else now,
            updated_at=now,
            step=before.step if before else 0,
            epoch=before.epoch if before else 0,
            total_steps=before.total_steps if before else 0,
            ran_s=before.ran_s if before else 0,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        self._max_duration, self._clock = max_duration, clock
        self._training, self._looked = False, clock()
        self.out_of_time = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="journal", daemon=True)

    def __enter__(self) -> Journal:
        self._run.total_steps.unlink(missing_ok=True)  # of an earlier attempt
        self.update()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def update(self, **changes: Any) -> Record:
        """Sets fields of the record, writes it now, and returns it."""
        with self._lock:
            self._count()
            self._record = self._record.model_copy(update=self._seen() | changes)
            self._run.write_record(self._record)
            late = self._max_duration is not None and self._record.ran_s >= self._max_duration
            if self._training and late and not self._run.stop.exists():  # else it stops for another reason
                self.out_of_time = True
                self._run.stop.touch()
            return self._record.model_copy()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While the run trains, once it is RUNNING, its time counts, and `max_duration` ends it."""
        self._training, self._looked = True, self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._count()
                self._training = False

    def _count(self) -> None:
        """Adds the time since the last look to that of the training."""
        now = self._clock()
        if self._training and self._record.state == "RUNNING":
            self._record.ran_s += now - self._looked
        self._looked = now

    def finish(self, state: RunState, reason: str | None = None, hint: str | None = None) -> None:
        self.update(state=state, reason=reason, hint=hint, finished_at=time.time())

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S / 5):
            try:
                self.update()
            except OSError as error:  # a full disk must not end the run by its heartbeat
                logger.warning("the record could not be written: %s", error)

    def _seen(self) -> dict[str, Any]:
        """Progress and skipped samples from the files of the workers."""
        seen: dict[str, Any] = {}
        point = self._run.last_point()
        if point is not None:
            seen |= {"step": point["step"], "epoch": point["epoch"]}
        if self._run.total_steps.exists():
            seen["total_steps"] = int(self._run.total_steps.read_text())
            if self._record.state == "STARTING":
                seen["state"] = "RUNNING"
        if self._run.skipped.exists():
            skipped = sorted(set(self._run.skipped.read_text().splitlines()))
            seen |= {"skipped": skipped[:_MAX_SKIPPED], "skipped_samples": len(skipped)}
        if self._run.warnings.exists():
            seen["warnings"] = self._run.warnings.read_text().splitlines()
        return seen
