"""A curve with fewer points, which still has what a person looks for: ends, lows and highs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KEPT = 4  # of each bucket: first, last, lowest, highest


def thinned(points: Sequence[dict[str, Any]], most: int, by: str = "loss") -> list[dict[str, Any]]:
    """At most `most` of the points, in their order: of each bucket the first, the last, the lowest and the highest.

    Args:
        points: in the order of steps.
        most: at least 4.
        by: the value that is lowest or highest; points without it are neither.
    """
    if len(points) <= most:
        return list(points)
    buckets = most // KEPT
    kept: set[int] = set()
    for i in range(buckets):
        inside = range(len(points) * i // buckets, len(points) * (i + 1) // buckets)
        valued = [k for k in inside if isinstance(points[k].get(by), (int, float))]
        kept |= {inside[0], inside[-1]}
        if valued:
            kept |= {min(valued, key=lambda k: points[k][by]), max(valued, key=lambda k: points[k][by])}
    return [points[k] for k in sorted(kept)]
