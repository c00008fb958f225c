"""What the reconciler of this process does: how long its rounds take, when the last one ended, what it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)


class Rounds(Collector):
    """The reconciler tells it of each round and act."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "manta_reconciler_round_seconds", "Duration of rounds.", registry=None, buckets=SECONDS
        )
        self._failed = Counter("manta_reconciler_rounds_failed", "Rounds that ended in an error.", registry=None)
        self._last = Gauge(
            "manta_reconciler_last_round_timestamp_seconds",
            "When the last round ended without an error.",
            registry=None,
        )
        self._acts = Counter(
            "manta_reconciler_acts",
            "What was done about jobs; `resubmit` is an attempt that Ray had lost.",
            ["act"],
            registry=None,
        )
        for act in ("submit", "resubmit", "stop", "finish", "check"):
            self._acts.labels(act)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around a round."""
        with self._failed.count_exceptions(), self._seconds.time():
            yield
        self._last.set_to_current_time()

    def acted(self, act: str) -> None:
        if act != "none":
            self._acts.labels(act).inc()

    def collect(self) -> Iterator[Metric]:
        return chain(self._seconds.collect(), self._failed.collect(), self._last.collect(), self._acts.collect())
