"""How often and how long the SDK asks again: one policy for all that it repeats.

Only what may succeed later is repeated (`ApiError.retryable`), and only what may be repeated: a submission under its
Idempotency-Key, a look, a stream that goes on behind its last event. A wait that is longer than the patience is told at
once instead: that of a project which is full is a decision, not an accident.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from service.api_error import ApiError

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # with one who has not answered yet: a service starts in less
FOLLOW_S = 600.0  # with one who has: a machine may take its place
FIRST_S = 0.5
MOST_S = 8.0  # between two tries, unless Retry-After is longer


class Retries:
    """Of one call, or of one job that is followed."""

    def __init__(
        self, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sleep, self._clock = sleep, clock
        self._patience_s, self._pause_s = PATIENCE_S, FIRST_S
        self._since: float | None = None  # when it began to fail; None: it does not

    def succeeded(self) -> None:
        """From now on it is waited for as for one who will come back."""
        self._patience_s, self._pause_s, self._since = FOLLOW_S, FIRST_S, None

    def wait(self, error: ApiError) -> None:
        """Waits until it is to be asked again; says so once, in the log, which a command shows on standard error.

        Raises:
            ApiError: this one; it is not to be asked again, or not in time.
        """
        if error.retry_after_s is None:
            raise error
        now = self._clock()
        first, self._since = self._since is None, now if self._since is None else self._since
        pause_s = max(error.retry_after_s, self._pause_s)
        if now + pause_s - self._since >= self._patience_s:
            raise error
        if first:
            logger.warning("%s: %s; asked again for up to %g s", error.title, error.detail, self._patience_s)
        self._sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, MOST_S)

    def rest(self) -> None:
        """Before what ended as it should is asked for again."""
        self._sleep(FIRST_S)
