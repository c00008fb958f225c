"""What came of injected faults: a row for each job or ordeal, and the tables of them at the end of a test run.

A plugin of pytest: any test of the suite hands its rows over by `record_row`. They travel with its report, as plain
tuples, from whichever process it ran in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import pytest

FAULT, KILL = "fault", "kill"
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


@dataclass(frozen=True)
class KillRow:
    """Jobs that were submitted while something was killed; all numbers are sums over them.

    Attributes:
        kill: what was killed.
        kills: how often.
        jobs: submitted, each under a key of its own.
        unanswered: submissions whose connection broke.
        refused: answered 503, to be tried again.
        known: answered 200: the job had been accepted before, and only the answer was lost.
        succeeded: jobs.
        attempts: as the service counts them.
        processes: that were started for them.
        began: processes that came to the work.
        ended: that came to the end of it.
        seconds: from the first submission to the end of the last job.
    """

    kill: str
    kills: int
    jobs: int
    unanswered: int
    refused: int
    known: int
    succeeded: int
    attempts: int
    processes: int
    began: int
    ended: int
    seconds: int


@pytest.fixture
def record_kill(record_property: Callable[[str, object], None]) -> Callable[[KillRow], None]:
    return lambda row: record_property(KILL, astuple(row))


@pytest.fixture
def record_row(record_property: Callable[[str, object], None]) -> Callable[[Row], None]:
    return lambda row: record_property(FAULT, astuple(row))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    calls = [report for report in reports if report.when == "call"]
    told = [(name, value) for report in calls for name, value in report.user_properties]
    rows = [Row(*value) for name, value in told if name == FAULT]
    kills = [tuple(map(str, value)) for name, value in told if name == KILL]
    titles = tuple(field.name for field in fields(KillRow))
    for what, lines in (("faults", table(rows) if rows else []), ("kills", aligned([titles, *kills]) if kills else [])):
        if lines:
            terminalreporter.section(f"{what}, FAULTS_SEED={os.environ['FAULTS_SEED']}")
        for line in lines:
            terminalreporter.write_line(line)


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of text, one a fault, in the order of their first rows."""
    by_fault: dict[str, list[Row]] = {}
    for row in rows:
        by_fault.setdefault(row.fault, []).append(row)
    return aligned([TITLES, *(_summed(name, found) for name, found in by_fault.items())])


def aligned(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of text whose columns stand below each other."""
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
