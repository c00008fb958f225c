"""What scores best for what it costs, among rows of candidates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def front(rows: Iterable[Row], cost: str) -> list[Row]:
    """Those that score higher than whatever costs no more, the cheapest first; rows without that cost do not count."""
    best, found = -float("inf"), []
    for row in sorted((row for row in rows if cost in row), key=lambda row: (row[cost], -row["score"])):
        if row["score"] > best:
            best = row["score"]
            found.append(row)
    return found


def unique(rows: Iterable[Row]) -> list[Row]:
    """One row for each structure, the best score first; of what was scored twice the higher one."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: -row["score"]):
        found.setdefault(row["candidate"], row)
    return [*found.values()]


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """Up to so many, evenly along the row, both ends among them."""
    if len(rows) <= most:
        return [*rows]
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
