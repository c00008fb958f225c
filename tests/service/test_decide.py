"""`decide` over every pair of what we, Ray and the run can say."""

from __future__ import annotations

import itertools
import time
from typing import get_args

import pytest

from service.decisions import Decision, decide, lives
from service.errors import Conflict
from service.ray_jobs import RayStatus
from service.store import SETTLED, TERMINAL, Job, JobState
from service.transitions import CANCEL, LENGTHEN_ENDED, PAUSE, RESUME, RETRY, Request
from workloads.record import Record, RunState

RAY: list[RayStatus | None] = [None, *get_args(RayStatus)]
RECORDS: list[RunState | None] = [None, *get_args(RunState)]


def job(state: JobState, **changes: object) -> Job:
    fields = {"id": "j", "state": state, "attempt": 1, "stalled": 0, "best_step": 0, "step": 0, "origin": "rest"}
    return Job(**(fields | changes))


def record(state: RunState | None, attempt: int = 1) -> Record | None:
    if state is None:
        return None
    now = time.time()
    return Record(job_id="j", state=state, attempt=attempt, started_at=now, updated_at=now, reason="why", hint="do")


def answer(row: Job, ray: RayStatus | None, said: Record | None, *, alive: bool = False, fits: bool = True) -> Decision:
    return decide(row, ray, said, time.time(), alive=alive, fits=fits, max_attempts=3, parents={})


@pytest.mark.parametrize("attempt", [1, 2])  # 2: the record is of the one before
@pytest.mark.parametrize("state", get_args(JobState))
def test_invariants(state: JobState, attempt: int) -> None:
    for ray, said, alive in itertools.product(RAY, RECORDS, [False, True]):
        check(state, attempt, ray, said, alive)


def check(state: JobState, attempt: int, ray: RayStatus | None, said: RunState | None, alive: bool) -> None:
    alive = alive and said in ("STARTING", "RUNNING")
    decision = answer(job(state, attempt=attempt), ray, record(said), alive=alive)
    at_work = alive or ray in ("PENDING", "RUNNING")
    if state in SETTLED:
        assert decision == Decision("none", state)  # what is over stays over
        return
    if decision.act in ("submit", "resubmit"):
        assert not at_work  # never two runs of one job
        assert state == "QUEUED" or said != "SUCCEEDED"  # what ended is not run again
        assert state == "QUEUED" or said != "FAILED" or attempt == 2  # unless it was resumed since
        assert state not in ("CANCELLING", "PAUSING")
    if decision.state in TERMINAL:
        assert decision.act == "finish"
    if decision.state == "SUCCEEDED":
        assert said == "SUCCEEDED"  # nobody else can say so, Ray's exit codes least of all
    if decision.state == "FAILED":
        assert decision.reason
    if decision.state == "CANCELLED":
        assert state == "CANCELLING" and not at_work
    if decision.state == "PAUSED":
        assert state == "PAUSING" and not at_work  # its CPUs and GPUs are given to others from now on
    if decision.act == "stop":
        assert state in ("CANCELLING", "PAUSING") and at_work
    if decision.act == "none" and decision.state not in ("QUEUED", "PAUSED"):
        assert at_work  # whoever waits, waits for something that moves (nothing stalled here)


def test_a_queued_job_waits_for_room() -> None:
    assert answer(job("QUEUED"), None, None, fits=False) == Decision("none", "QUEUED")
    assert answer(job("QUEUED"), None, None) == Decision("submit", "STARTING")


def test_a_job_that_ray_calls_failed_while_it_lives_is_left_alone() -> None:
    assert answer(job("RUNNING"), "FAILED", record("RUNNING"), alive=True) == Decision("none", "RUNNING")


def test_lost_with_its_head_it_is_submitted_again() -> None:
    assert answer(job("RUNNING"), None, record("RUNNING")) == Decision("submit", "STARTING")


def test_a_submission_that_ray_never_saw_is_the_same_attempt() -> None:
    assert answer(job("STARTING"), None, None).act == "resubmit"
    assert answer(job("STARTING", attempt=2), None, record("STOPPED", attempt=1)).act == "resubmit"


def test_a_stop_that_nobody_asked_for_continues() -> None:
    assert answer(job("RUNNING"), "SUCCEEDED", record("STOPPED")) == Decision("submit", "STARTING")


def test_a_job_by_ray_that_was_stopped_by_ray_is_cancelled() -> None:
    assert answer(job("RUNNING", origin="ray"), "STOPPED", record("STOPPED")).state == "CANCELLED"
    assert answer(job("RUNNING", origin="ray"), None, record("RUNNING")).act == "submit"  # lost, not stopped


def test_without_progress_it_is_given_up_with_a_reason() -> None:
    decision = answer(job("RUNNING", stalled=2), "FAILED", None)
    assert decision.state == "FAILED" and decision.reason is not None and "3 times" in decision.reason


def test_attempts_without_progress_wait_longer_and_longer() -> None:
    for stalled, age_s, act in ((1, 1, "none"), (1, 3, "submit"), (0, 0, "submit")):
        row = job("STARTING", stalled=stalled, submitted_at=time.time() - age_s)
        assert decide(row, "FAILED", None, time.time(), alive=False, fits=True, max_attempts=5, parents={}).act == act


def test_a_job_that_finished_before_its_cancel_says_so() -> None:
    assert answer(job("CANCELLING"), "SUCCEEDED", record("SUCCEEDED")).state == "SUCCEEDED"


def test_a_pause_waits_for_the_checkpoint_and_the_work_that_was_finished_counts() -> None:
    assert answer(job("PAUSING"), "RUNNING", record("RUNNING"), alive=True) == Decision("stop", "PAUSING")
    assert answer(job("PAUSING"), "STOPPED", record("STOPPED")).state == "PAUSED"
    assert answer(job("PAUSING"), "SUCCEEDED", record("SUCCEEDED")).state == "SUCCEEDED"
    assert answer(job("PAUSING"), "FAILED", record("FAILED")) == Decision("finish", "FAILED", "why", "do")


def test_a_resumed_job_waits_for_a_run_that_came_back() -> None:
    assert answer(job("QUEUED"), None, record("RUNNING"), alive=True) == Decision("none", "QUEUED")


@pytest.mark.parametrize("request_", [CANCEL, PAUSE, RESUME], ids=lambda request_: request_.verb)
def test_requests_are_idempotent_and_leave_what_is_over(request_: Request) -> None:
    for state in get_args(JobState):
        try:
            after = request_.next_state("j", state)
        except Conflict as refusal:
            assert request_ is not CANCEL and state not in ("QUEUED", "STARTING", "RUNNING", "PAUSED")
            assert state in refusal.detail and refusal.hint
            continue
        assert request_.next_state("j", after) == after
        assert state not in TERMINAL or after == state


def test_a_retry_is_of_what_ended_without_success() -> None:
    assert [s for s in get_args(JobState) if s in RETRY.moves and RETRY.next_state("j", s) != s] == [
        "FAILED",
        "CANCELLED",
    ]
    assert RETRY.next_state("j", "RUNNING") == "RUNNING"
    for state, hint in (("SUCCEEDED", "submit a new job"), ("PAUSED", "resume it"), ("PAUSING", "ask again")):
        with pytest.raises(Conflict, match=f"which is {state}") as refusal:
            RETRY.next_state("j", state)  # type: ignore[arg-type]
        assert hint in refusal.value.hint


def test_only_a_longer_limit_brings_a_failed_job_back() -> None:
    assert LENGTHEN_ENDED.next_state("j", "FAILED") == "QUEUED"
    with pytest.raises(Conflict, match="which is SUCCEEDED, expected PAUSED or FAILED"):
        LENGTHEN_ENDED.next_state("j", "SUCCEEDED")
    with pytest.raises(Conflict, match="which is RUNNING") as refusal:
        LENGTHEN_ENDED.next_state("j", "RUNNING")
    assert "pause it first" in refusal.value.hint


def test_lives_by_heartbeat_and_pid() -> None:
    now = time.time()
    fresh = Record(job_id="j", state="RUNNING", started_at=now, updated_at=now, host="elsewhere", pid=1)
    assert lives(fresh, now)
    assert not lives(fresh, now + 60)
    assert not lives(fresh.model_copy(update={"state": "STOPPED"}), now)
    assert not lives(None, now)
    import socket

    gone = fresh.model_copy(update={"host": socket.gethostname(), "pid": 2**22 + 1})
    assert not lives(gone, now)
