"""What is true of a job, and what to do about it: pure, so that every pair of states can be tried with a made-up clock.

The order of truth is ours: a row that is terminal stays; then the run's own record; Ray's status is a hint, since Ray
loses jobs with its head and can call a living one FAILED.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Literal

import psutil

from service.dependencies import lost, waiting, waits_for
from service.errors import ServiceError
from service.ray_jobs import RayStatus
from service.store import SETTLED, Job, JobState
from workloads.preflight import Problem
from workloads.record import HEARTBEAT_S, Record

STALE_S = 4 * HEARTBEAT_S  # a run that has been silent for so long is dead
MAX_BACKOFF_S = 60.0  # between attempts that make no progress: 2, 4, 8, ... s
MAX_CHECKS = 10  # of a held job that could not be made: a store may be away for five minutes
LONGEST_ERROR = 600  # characters of it in a reason
CHECKING = "is being checked: what it names is there now"


@dataclass(frozen=True)
class Decision:
    """What to do about a job, and the state that is true.

    `submit` starts the next attempt, `resubmit` the same one again: Ray never heard of it. `check` looks whether a job
    can run whose parents have succeeded.
    """

    act: Literal["submit", "resubmit", "stop", "finish", "check", "none"]
    state: JobState
    reason: str | None = None
    hint: str | None = None


def lives(record: Record | None, now: float) -> bool:
    """Whether the process of the record is at work: its heartbeat is fresh, and its pid not known to be gone."""
    if record is None or record.state not in ("STARTING", "RUNNING") or now - record.updated_at > STALE_S:
        return False
    return record.host != socket.gethostname() or psutil.pid_exists(record.pid)


def stalled_after(row: Job, record: Record | None) -> int:
    """Attempts in a row without progress, now that the newest has ended; its record may know more than the row."""
    return 0 if reached(row, record) > row.best_step else row.stalled + 1


def reached(row: Job, record: Record | None) -> int:
    """The furthest step of the newest attempt that is known."""
    return max(row.step, 0 if record is None else record.step)


def decide(
    row: Job,
    ray: RayStatus | None,
    record: Record | None,
    now: float,
    *,
    alive: bool,
    fits: bool,
    max_attempts: int,
    parents: Mapping[str, JobState | None],
) -> Decision:
    """What is true of a job, and what to do.

    Args:
        row: our row.
        ray: Ray's status of the attempt; None: Ray does not know it.
        record: what the run said last.
        now: seconds since the epoch.
        alive: whether a process of the job is at work, whatever Ray says.
        fits: whether the cluster has room for it.
        max_attempts: that may end in a row without a step of progress.
        parents: the jobs that it comes after; None: not in the table any more.
    """
    if row.state in SETTLED:
        return Decision("none", row.state)
    at_work = alive or ray in ("PENDING", "RUNNING")
    if row.state == "QUEUED" and row.held:
        if ended := lost(parents):
            return Decision("finish", "FAILED", *ended)
        if open_ := waits_for(parents):
            return Decision("none", "QUEUED", waiting(open_))
        return Decision("check", "QUEUED")
    if record is not None and record.state == "SUCCEEDED":  # in the queue too: it was paused, but went on unseen
        return Decision("finish", "SUCCEEDED")
    if row.state == "QUEUED":
        return Decision("submit", "STARTING") if fits and not at_work else Decision("none", "QUEUED")

    if record is not None and record.state == "FAILED" and record.attempt >= row.attempt:  # else it was resumed since
        return Decision("finish", "FAILED", record.reason, record.hint)

    if row.state == "CANCELLING":
        if not at_work:
            return Decision("finish", "CANCELLED", "cancelled on request")
        return Decision("stop", "CANCELLING")
    if row.state == "PAUSING":
        if at_work:
            return Decision("stop", "PAUSING")
        return Decision("none", "QUEUED") if row.gives_way else Decision("none", "PAUSED", "paused on request")
    if at_work:
        running = record is not None and record.state == "RUNNING" and record.attempt == row.attempt
        return Decision("none", "RUNNING" if running else row.state)
    if row.origin == "ray" and ray == "STOPPED":
        return Decision("finish", "CANCELLED", "stopped by `ray job stop`")
    if ray is None and (record is None or record.attempt < row.attempt):
        return Decision("resubmit", "STARTING")
    stalled = stalled_after(row, record)
    if stalled >= max_attempts:
        reason = f"ended {max_attempts} times in a row without a step of progress and without giving a reason"
        return Decision("finish", "FAILED", reason, "its log has the last words of the process")
    waited = now - (row.submitted_at or 0.0)
    if stalled > 1 and 0 <= waited < min(MAX_BACKOFF_S, 2.0 ** (stalled - 1)):  # below 0: the clock was put back
        return Decision("none", row.state)
    return Decision("submit", "STARTING")


def checked(problems: Sequence[Problem]) -> Decision:
    """What becomes of a held job that was checked."""
    if problems:
        return Decision("finish", "FAILED", problems[0].sentence, problems[0].hint)
    return Decision("check", "QUEUED")


def unchecked(job_id: str, error: BaseException, tries: int) -> Decision:
    """What becomes of a held job whose check could not be made, so many times in a row."""
    why = f"could not be checked ({brief(error)})"
    if tries >= MAX_CHECKS:
        return Decision("finish", "FAILED", f"{why}, {tries} times in a row", f"mend it, then `manta retry {job_id}`")
    return Decision("none", "QUEUED", f"{why}; tried again soon")


def check_pause_s(tries: int) -> float:
    """Between a check that could not be made and the next one: 2, 4, 8, ... s; 0 before the first."""
    return min(MAX_BACKOFF_S, 2.0**tries) if tries else 0.0


def brief(error: BaseException) -> str:
    """An error on one line of what any database takes."""
    text = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {error}"
    text = text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return shorten(text, LONGEST_ERROR)


def ended(job: Job, record: Record | None) -> bool:
    """Whether the process of the newest attempt has said that it is over, or one before that the job is done."""
    if record is None or record.state in ("STARTING", "RUNNING"):
        return False
    return record.attempt >= job.attempt or record.state == "SUCCEEDED"


def stands(job: Job, decision: Decision, record: Record | None) -> bool:
    """Whether the row says already what is true: a check that passed lets go of a job that was held."""
    seen = record is None or record.attempt != job.attempt
    progress = None if record is None else (record.step, record.epoch, record.total_steps)
    known = seen or (progress == (job.step, job.epoch, job.total_steps) and job.started_at is not None)
    same = (job.state, job.reason, job.hint) == (decision.state, decision.reason, decision.hint)
    return known and same and decision.act != "check"


def said(row: Job, decision: Decision) -> str:
    """What the event tells where no reason stands in the row."""
    return "gave way, and goes on from its checkpoint" if decision.state == "QUEUED" else f"attempt {row.attempt}"
