"""Ends a process that makes no step any more, so that it is started again from its last checkpoint.

A hung collective or CUDA call cannot be interrupted from Python; only the end of the process helps.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

HUNG = 71  # exit code
GRACE_S = (
    15.0  # from the stacks to the end: the first rank that ends takes the others with it, before they wrote theirs
)
LONGEST_WAIT_S = 5.0  # between two looks


def end_process() -> None:
    """Without clean-up, which would wait for what hangs."""
    os._exit(HUNG)


class Watchdog:
    """Watches the loop that calls `beat`; a context manager.

    After `limit_s` without a beat the stacks of all threads of this process are appended to a
    file and logged of; 15 s later, still without one, the process ends with exit code 71. What
    holds Python's global lock for ever is not seen: the thread that watches needs the lock too.
    Neither are child processes: their stacks are not in the file.
    """

    def __init__(
        self,
        limit_s: float | None,
        stacks: Path,
        *,
        rank: int = 0,
        tell: Callable[[str], None] = lambda _: None,
        on_hang: Callable[[], None] = end_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The watch begins with the context.

        Args:
            limit_s: `Guards.hang`; None: nothing is watched.
            stacks: a file of this rank alone; appended to.
            rank: told in the file.
            tell: gets a sentence for a person once the stacks are written.
            on_hang: ends the process.
            clock: seconds.
        """
        self._limit_s, self._stacks, self._rank = limit_s, stacks, rank
        self._tell_person, self._on_hang, self._clock = tell, on_hang, clock
        self._step = 0
        self._pauses = 0
        self._beat_at = self._looked_at = clock()
        self._told_of: float | None = None
        self._telling: threading.Thread | None = None
        self._left = threading.Event()

    def beat(self, step: int | None = None) -> None:
        """The loop lives; `step`: how many steps are done."""
        if step is not None:
            self._step = step
        self._beat_at = self._clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, the loop may take as long as it likes: compilation, a wait for a checkpoint, `after_epoch`."""
        self._pauses += 1
        try:
            yield
        finally:
            self.beat()
            self._pauses -= 1

    def check(self) -> None:
        """One look of the watching thread."""
        if self._limit_s is None:
            return
        now, looked_at, beat_at = self._clock(), self._looked_at, self._beat_at
        self._looked_at = now
        if now - looked_at > LONGEST_WAIT_S + self._limit_s / 2:  # the whole process stood still: Ctrl-Z, a debugger
            self.beat()
        elif self._pauses or now - beat_at < self._limit_s:
            return
        elif self._told_of != beat_at:
            self._told_of = beat_at
            # in a thread of its own: a hung file system or the lock of a log handler must not keep the process alive
            self._telling = threading.Thread(target=self._tell, args=(now - beat_at,), daemon=True)
            self._telling.start()
        elif now - beat_at >= self._limit_s + GRACE_S:
            self._on_hang()

    def _tell(self, idle_s: float) -> None:
        what = f"rank {self._rank} made no step for {idle_s:.0f} s after step {self._step}"
        with open(self._stacks, "a") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {what}\n")
            file.flush()  # faulthandler writes past Python's buffer
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
        self._tell_person(f"{what}; its stacks are in {self._stacks.name}")
        logger.error(
            "%s: its stacks are in %s; the process ends in %.0f s and goes on from the last checkpoint when it is "
            "started again; if steps really take so long, raise guards.hang",
            what,
            self._stacks,
            GRACE_S,
        )

    def _watch(self, wait_s: float) -> None:
        while not self._left.wait(wait_s):
            self.check()

    def __enter__(self) -> Watchdog:
        if self._limit_s is not None:
            self.beat()
            self._looked_at = self._beat_at
            wait_s = min(LONGEST_WAIT_S, self._limit_s / 10)
            threading.Thread(target=self._watch, args=(wait_s,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
