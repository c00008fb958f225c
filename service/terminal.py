"""How the `manta` command talks: tables and bars on a terminal, plain lines in a pipe, JSON on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from service.client import Client

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

OK, FAILED, USAGE, CANCELLED, UNREACHABLE = 0, 1, 2, 3, 4
LINE_EVERY_S = 3.0  # of plain progress in a pipe


def fail(message: object, code: int = FAILED) -> NoReturn:
    """One message on standard error, and the exit code."""
    err.print(str(message), style="red", markup=False, highlight=False)
    raise typer.Exit(code)


def show_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on a terminal; tab-separated lines in a pipe."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not out.is_terminal:
        for row in [list(columns), *cells]:
            sys.stdout.write("\t".join(row) + "\n")
        return
    table = Table(*columns, title=title)
    for row in cells:
        table.add_row(*row)
    out.print(table)


class JobProgress:
    """Shows a job as it goes: call it with each answer and the newest point of its curve."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, note="") if bar is not None else None
        self._said, self._phase, self._line = 0.0, "", ""

    def __call__(self, job: dict[str, Any], point: dict[str, Any] | None) -> None:
        progress = job["progress"]
        note = f"loss {point['loss']:.4f}  {point['samples_per_s']:.0f} samples/s" if point else ""
        trained = progress["total_steps"] and progress["step"] >= progress["total_steps"]
        phase = "evaluating" if job["state"] == "RUNNING" and trained else job["state"].lower()
        if phase == "evaluating":
            note = f"{len(job['evaluations'])} of {len(job['spec']['evaluate'])} evaluations done"
        if self._bar is not None and self._task is not None:
            total = progress["total_steps"] or None
            self._bar.update(self._task, description=phase, completed=progress["step"], total=total, note=note)
            return
        line = f"{job['id']} {phase} step {progress['step']}/{progress['total_steps']} epoch {progress['epoch']} {note}"
        if phase != self._phase or (line != self._line and time.monotonic() - self._said > LINE_EVERY_S):
            sys.stdout.write(line.rstrip() + "\n")
            sys.stdout.flush()
            self._said, self._phase, self._line = time.monotonic(), phase, line


@contextmanager
def job_progress() -> Iterator[JobProgress]:
    """A bar where there is a terminal."""
    if not out.is_terminal:
        yield JobProgress(None)
        return
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=out) as bar:
        yield JobProgress(bar)


def follow(client: Client, job_id: str) -> dict[str, Any]:
    """Shows a job until it ends, and returns it."""
    point: dict[str, Any] = {}
    with job_progress() as show:

        def update(job: dict[str, Any]) -> None:
            if newer := client.metrics(job_id, after_step=point.get("step", -1)):
                point.update(newer[-1])
            show(job, point or None)

        return client.wait(job_id, update)
