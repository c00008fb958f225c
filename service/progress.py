"""A job on the terminal while it runs: one bar where there is a terminal, a plain line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from service.terminal import out

if TYPE_CHECKING:
    from service.client import Client

LINE_EVERY_S = 3.0  # of a phase that goes on
RECENT_POINTS = 20  # that say how fast it goes
WORDS_WIDTH = 84  # of a line with all of them

_SHOWN: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda loss: f"loss {loss:.4f}" if 1e-3 <= abs(loss) < 1e4 else f"loss {loss:.3g}"),
    ("samples_per_s", lambda rate: f"{rate:,.0f} samples/s" if rate >= 100 else f"{rate:.3g} samples/s"),
    ("best_score", lambda score: f"best {score:.6g}"),
    ("candidates_per_s", lambda rate: f"{rate:,.3g} candidates/s"),
    ("data_wait_share", lambda share: f"data wait {share:.0%}"),
    ("skipped_steps", lambda steps: f"{steps} steps skipped"),
)


def note_of(point: dict[str, Any]) -> str:
    """What a point of the curve says in a few words; what it lacks, or is None, is left out."""
    return "  ".join(words(point[name]) for name, words in _SHOWN if point.get(name) is not None)


def duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`, `4d03h`."""
    s = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if s >= size:
            return f"{s // size}{unit}{s % size // part:02d}{below}"
    return f"{s}s"


def eta(ends_at: float | None, now: float) -> str:
    return "" if ends_at is None else f"eta {duration(max(0.0, ends_at - now))}"


class Pace:
    """Seconds that a step takes: the median over recent points of this attempt, so neither compiling nor a stall count.

    The points time themselves. What an earlier attempt did, perhaps on other machines, or how often somebody looks,
    has no part in it.
    """

    def __init__(self) -> None:
        self._attempt: object = None
        self._step = -1
        self._step_times_s: deque[float] = deque(maxlen=RECENT_POINTS)

    def add(self, attempt: object, point: dict[str, Any]) -> None:
        if attempt != self._attempt or point["step"] < self._step:
            self._step_times_s.clear()
            self._attempt, self._step = attempt, -1
        if point["step"] > self._step and point.get("step_time_s") is not None:
            self._step_times_s.append(point["step_time_s"])
            self._step = point["step"]

    def step_s(self) -> float | None:
        return median(self._step_times_s) if self._step_times_s else None


class JobProgress:
    """Shows a job as it goes: call it with each answer and, where it is newer than the last, a point of its curve."""

    def __init__(self, bar: Progress | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bar, self._clock = bar, clock
        self._task = None if bar is None else bar.add_task("starting", total=None, note="", ends_at=None)
        self._pace = Pace()
        self._point: dict[str, Any] = {}
        self._ends_at: float | None = None  # by the clock, as of the last point
        self._said_at, self._phase, self._line = clock(), "", ""

    def __call__(self, job: dict[str, Any], point: dict[str, Any] | None = None) -> None:
        progress = job["progress"]
        step, total, epoch = progress["step"], progress["total_steps"] or None, progress["epoch"]
        trained = total is not None and step >= total
        after = "measuring" if "search" in job["spec"] else "evaluating"
        phase = after if job["state"] == "RUNNING" and trained else job["state"].lower()
        if point is not None:
            self._point = point
        if phase != "running":
            self._ends_at = None
        elif point is not None:
            self._pace.add(job.get("attempt"), point)
            step_s = self._pace.step_s()
            self._ends_at = None if step_s is None or total is None else self._clock() + step_s * (total - step)
        note = note_of(self._point)
        if "search" not in job["spec"]:
            note = f"epoch {epoch}  {note}".rstrip()
            if phase == "evaluating":
                note = f"{len(job['evaluations'])} of {len(job['spec']['evaluate'])} evaluations done"
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, description=phase, completed=step, total=total, note=note, ends_at=self._ends_at
            )
        else:
            self._say(phase, f"{job['id']} {phase} step {step}/{total or '?'} {note}")

    def _say(self, phase: str, line: str) -> None:
        now = self._clock()
        if phase != self._phase or (line != self._line and now - self._said_at > LINE_EVERY_S):
            whole = f"{line}  {eta(self._ends_at, now)}".rstrip()
            sys.stdout.write(whole + "\n")  # at once: two writes could be torn by another process
            sys.stdout.flush()
            self._said_at, self._phase, self._line = now, phase, line


class Eta(ProgressColumn):
    """Counts down between two points."""

    def render(self, task: Task) -> Text:
        return Text(eta(task.fields["ends_at"], task.get_time()), style="cyan")


class Note(ProgressColumn):
    """The last words of the line: cut where it is too narrow, so that all else stays."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def bar_on(console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    """The bar takes what the words leave of the line; what is written to standard error meanwhile goes above it."""
    whole = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", table_column=whole.copy()),
        BarColumn(bar_width=min(40, max(4, console.width - WORDS_WIDTH)), table_column=whole.copy()),
        MofNCompleteColumn(table_column=whole.copy()),
        Eta(table_column=whole.copy()),
        Note(),
        console=console,
        get_time=clock,
        refresh_per_second=4,  # of the very core that trains
        redirect_stderr=sys.stderr.isatty(),  # else it is a file, which must not lose it to the terminal
    )


@contextmanager
def job_progress() -> Iterator[JobProgress]:
    """A bar where there is a terminal; it leaves the cursor as it was, however the block ends."""
    if not out.is_terminal:
        yield JobProgress(None)
        return
    with bar_on(out) as bar:
        yield JobProgress(bar)


def follow(client: Client, job_id: str) -> dict[str, Any]:
    """Shows a job until it ends, and returns it."""
    seen = 0
    with job_progress() as show:

        def update(job: dict[str, Any]) -> None:
            nonlocal seen
            step, point = job["progress"]["step"], None
            if step != seen:
                # the curve may go on after it: points of an attempt that was killed, which this one has yet to replace
                point = next((p for p in client.metrics(job_id, after_step=step - 1) if p["step"] == step), None)
            if point is not None:
                seen = step
            show(job, point)

        return client.wait(job_id, update)
