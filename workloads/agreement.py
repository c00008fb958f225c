"""When the ranks of a job ask each other whether to go on: soon enough to stop in time, too seldom to cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from workloads.ranks import Ranks

POLL_S = 2.0


class Agreement:
    """One on each rank; all ranks call it after every step and get the same answer."""

    def __init__(
        self,
        ranks: Ranks,
        should_stop: Callable[[], bool],
        preempted: Callable[[], bool],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Keeps what to ask.

        Args:
            ranks: those of the job.
            should_stop: whether this rank was asked to stop.
            preempted: whether this rank was told that a node of the job is about to be taken away.
            clock: seconds.
        """
        self._ranks, self._should_stop, self._preempted, self._clock = ranks, should_stop, preempted, clock
        self._asked_at, self._asked_s, self._next, self._leaving = 0, clock(), 0, False

    def after(self, step: int) -> Literal["go on", "save", "stop"]:
        """What to do after `step` done steps.

        A job of one rank looks after each step. Several ask each other about every 2 s, counted in steps, since they
        must all ask at the same step; after a preemption notice at each step, each of which may be the last.
        """
        if step < self._next:
            return "go on"
        now = self._clock()
        step_s = (now - self._asked_s) / max(1, step - self._asked_at)
        self._asked_at, self._asked_s = step, now
        # one exchange for all three; step_s is then the same on every rank
        stop, leaving, step_s = self._ranks.means(self._should_stop(), self._leaving or self._preempted(), step_s)
        self._leaving = leaving > 0
        each = self._leaving or self._ranks.world_size == 1
        self._next = step + (1 if each else max(1, min(1000, int(POLL_S / max(step_s, 1e-6)))))
        return "stop" if stop else "save" if self._leaving else "go on"
