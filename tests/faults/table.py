"""What came of injected faults: a row for each job, and the table of them at the end of a test run.

A test hands its rows over by pytest's own `record_property(FAULT, row)`, so any test of the suite can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FAULT = "fault"
TITLES = ("fault", "injected", "jobs finished", "steps lost", "final weights bit-equal")


@dataclass(frozen=True)
class Row:
    """One job that was run to its end in spite of a fault.

    Attributes:
        fault: its name.
        injected: how often.
        finished: whether the job succeeded.
        lost: steps that were made again, over all attempts.
        equal: whether the final weights are those of a run that nothing happened to, bit for bit.
    """

    fault: str
    injected: int
    finished: bool
    lost: int
    equal: bool


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of text, one a fault, in the order of their first rows."""
    by_fault: dict[str, list[Row]] = {}
    for row in rows:
        by_fault.setdefault(row.fault, []).append(row)
    cells = [TITLES, *(_summed(name, found) for name, found in by_fault.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _summed(fault: str, rows: list[Row]) -> tuple[str, ...]:
    finished, equal = sum(row.finished for row in rows), sum(row.equal for row in rows)
    return (
        fault,
        str(sum(row.injected for row in rows)),
        f"{finished} of {len(rows)}",
        str(sum(row.lost for row in rows)),
        f"{equal} of {len(rows)}",
    )
