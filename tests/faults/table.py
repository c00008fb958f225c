"""What came of injected faults: a row for each job, and the table of them at the end of a test run.

A plugin of pytest: any test of the suite hands its rows over by `record_row`. They travel with its report, as plain
tuples, from whichever process it ran in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any

import pytest

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


@pytest.fixture
def record_row(record_property: Callable[[str, object], None]) -> Callable[[Row], None]:
    return lambda row: record_property(FAULT, astuple(row))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    calls = [report for report in reports if report.when == "call"]
    rows = [Row(*value) for report in calls for name, value in report.user_properties if name == FAULT]
    if rows:
        terminalreporter.section(f"faults, FAULTS_SEED={os.environ['FAULTS_SEED']}")
        for line in table(rows):
            terminalreporter.write_line(line)


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
