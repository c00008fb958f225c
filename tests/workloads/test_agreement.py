"""Ranks ask each other at the same steps, however fast each of them thinks it is."""

from __future__ import annotations

import threading
from typing import Any

from workloads.agreement import POLL_S, Agreement
from workloads.ranks import Ranks


class Both(Ranks):
    """Two ranks in two threads of one process, without sockets."""

    shared: list[Any]
    meeting: threading.Barrier

    def exchange(self, values: tuple[float, ...]) -> list[tuple[float, ...]]:
        self.shared[self.rank] = values
        self.meeting.wait(5)
        both = list(self.shared)
        self.meeting.wait(5)
        return both

    def means(self, *values: float) -> list[float]:
        return [sum(one) / 2 for one in zip(*self.exchange(values), strict=True)]


def run(step_s: tuple[float, float], stop_at: int, preempted_at: int | None = None) -> list[dict[int, str]]:
    shared, meeting = [None, None], threading.Barrier(2)
    answers: list[dict[int, str]] = [{}, {}]

    def rank(number: int) -> None:
        ranks = Both(number, 2)
        object.__setattr__(ranks, "shared", shared)
        object.__setattr__(ranks, "meeting", meeting)
        now = step = 0.0

        def preempted() -> bool:
            return number == 1 and preempted_at is not None and step >= preempted_at  # one of them is told

        agreement = Agreement(ranks, lambda: number == 1 and step >= stop_at, preempted, clock=lambda: now)
        for step in range(1, 400):
            now += step_s[number]
            answers[number][step] = agreement.after(step)
            if answers[number][step] == "stop":
                return

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return answers


def test_both_stop_after_the_same_step_within_seconds() -> None:
    first, second = run(step_s=(0.01, 0.03), stop_at=50)
    assert first == second and list(first.values())[-1] == "stop"
    assert 50 <= max(first) <= 50 + POLL_S / 0.02 + 1


def test_slow_steps_are_asked_after_each() -> None:
    first, second = run(step_s=(5.0, 5.0), stop_at=7)
    assert first == second and max(first) == 7


def test_after_a_preemption_notice_each_step_is_saved() -> None:
    first, second = run(step_s=(0.1, 0.1), stop_at=60, preempted_at=20)
    assert first == second
    saved = [step for step, answer in first.items() if answer == "save"]
    assert 20 <= saved[0] <= 41 and saved == list(range(saved[0], max(first)))


def test_one_rank_looks_after_each_step() -> None:
    asked: list[int] = []
    agreement = Agreement(Ranks(), lambda: len(asked) == 9, lambda: False)
    for step in range(1, 10):
        asked.append(step)
        assert agreement.after(step) == ("stop" if step == 9 else "go on")
