"""A figure as a row of RESULTS.md."""

from __future__ import annotations

Row = tuple[str, str, str, bool | None]
"""What, measured, wanted, and whether that is reached; None: nothing is wanted, or nothing was measured."""

MARKS = {True: "yes", False: "**no**", None: ""}


def markdown(row: Row) -> str:
    what, measured, wanted, reached = row
    return f"| {what} | {measured} | {wanted} | {MARKS[reached]} |"
