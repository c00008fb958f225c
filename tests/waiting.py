"""Waiting for what other processes and threads do: no test is by the clock, but none hangs either."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LIMIT_S = 300.0  # of a busy machine


def until(condition: Callable[[], T], what: str = "nothing happened", *, pause_s: float = 0.05) -> T:
    """The first true answer of `condition`.

    Args:
        condition: asked again and again.
        what: was waited for, or went wrong.
        pause_s: between two questions.

    Raises:
        AssertionError: there was none in `LIMIT_S`.
    """
    deadline = time.monotonic() + LIMIT_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {LIMIT_S:g} s"
        time.sleep(pause_s)
    return answer
