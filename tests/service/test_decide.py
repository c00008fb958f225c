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

NOW = 1.8e9
RAY: list[RayStatus | None] = [None, *get_args(RayStatus)]
RECORDS: list[RunState | None] = [None, *get_args(RunState)]


def job(state: JobState, **changes: object) -> Job:
    fields = {"id": "j", "state": state, "attempt": 1, "stalled": 0, "best_step": 0, "step": 0, "origin": "rest"}
    return Job(**(fields | changes))


def record(state: RunState | None, attempt: int = 1, step: int = 0) -> Record | None:
    if state is None:
        return None
    times = {"started_at": NOW, "updated_at": NOW}
    return Record(job_id="j", state=state, attempt=attempt, step=step, reason="why", hint="do", **times)


def answer(row: Job, ray: RayStatus | None, said: Record | None, *, alive: bool = False, fits: bool = True) -> Decision:
    return decide(row, ray, said, NOW, alive=alive, fits=fits, max_attempts=3, parents={})


PARENTS: list[JobState | None] = [None, *get_args(JobState)]
STALLED = 3  # attempts, of which the last may make progress that the row does not know of


@pytest.mark.parametrize("origin", ["rest", "ray"])
@pytest.mark.parametrize("attempt", [1, 2])  # 2: the record is of the one before
@pytest.mark.parametrize("state", get_args(JobState))
def test_invariants(state: JobState, attempt: int, origin: str) -> None:
    """Every row state, every Ray status, every record; heard of or not; with room or not; stalled or not; any clock."""
    for ray, said, alive, fits, stalled, step, waited_s in itertools.product(
        RAY, RECORDS, [False, True], [False, True], [0, STALLED - 1], [0, 1], [-3600, 0, 3600]
    ):
        row = job(state, attempt=attempt, origin=origin, stalled=stalled, submitted_at=NOW - waited_s)
        check(row, ray, record(said, step=step), alive, fits)


def check(row: Job, ray: RayStatus | None, record: Record | None, alive: bool, fits: bool) -> None:
    said = None if record is None else record.state
    alive = alive and said in ("STARTING", "RUNNING")
    limits = {"alive": alive, "fits": fits, "max_attempts": STALLED}
    decision = decide(row, ray, record, NOW, **limits, parents={})  # type: ignore[arg-type]
    at_work = alive or ray in ("PENDING", "RUNNING")
    if row.state in SETTLED:
        assert decision == Decision("none", row.state)  # what is over stays over
        return
    if decision.act in ("submit", "resubmit"):
        assert not at_work  # never two runs of one job
        assert said != "SUCCEEDED"  # what is done is not done again
        assert row.state == "QUEUED" or said != "FAILED" or row.attempt == 2  # unless it was resumed since
        assert row.state not in ("CANCELLING", "PAUSING")
        assert row.state != "QUEUED" or fits
        assert decision.act == "submit" or ray is None  # the same attempt again: only if Ray never heard of it
    if decision.state in TERMINAL:
        assert decision.act == "finish"
    if said == "SUCCEEDED":
        assert decision.state == "SUCCEEDED"
    if decision.state == "SUCCEEDED":
        assert said == "SUCCEEDED"  # nobody else can say so, Ray's exit codes least of all
    if decision.state == "FAILED":
        assert row.state != "QUEUED" and decision.reason
        gave_up = "in a row" in decision.reason
        assert gave_up or (said, decision.reason, decision.hint) == ("FAILED", "why", "do")
        assert not gave_up or (row.stalled and record is not None and record.step == 0) or record is None
    if decision.state == "CANCELLED":
        by_ray = row.origin == "ray" and ray == "STOPPED" and row.state in ("STARTING", "RUNNING")
        assert (row.state == "CANCELLING" or by_ray) and not at_work
    if decision.state == "PAUSED":
        assert row.state == "PAUSING" and not at_work  # its CPUs and GPUs are given to others from now on
    if decision.act == "stop":
        assert row.state in ("CANCELLING", "PAUSING") and at_work
    if decision.act == "none" and decision.state not in ("QUEUED", "PAUSED"):
        waits = row.stalled and row.submitted_at == NOW  # for the next attempt, and not for a clock that was put back
        assert at_work or waits  # whoever waits, waits for something that moves


@pytest.mark.parametrize("first", PARENTS)
def test_invariants_of_a_job_that_comes_after_others(first: JobState | None) -> None:
    for second, ray, fits in itertools.product(PARENTS, RAY, [False, True]):
        parents = {"a": first, "b": second}
        row = job("QUEUED", attempt=0, held=True)
        decision = decide(row, ray, None, NOW, alive=False, fits=fits, max_attempts=3, parents=parents)
        if {first, second} & {"FAILED", "CANCELLED", None}:
            assert decision.act == "finish" and decision.state == "FAILED" and decision.reason and decision.hint
        elif first == second == "SUCCEEDED":
            assert decision == Decision("check", "QUEUED")  # it is looked at before it takes room
        else:
            assert (decision.act, decision.state) == ("none", "QUEUED") and "waits for" in (decision.reason or "")


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


def test_progress_that_only_the_record_knows_counts() -> None:
    """The service was away while the run got on and died."""
    assert answer(job("RUNNING", stalled=2), None, record("RUNNING", step=7)).act == "submit"
    assert answer(job("RUNNING", stalled=2, best_step=7), None, record("RUNNING", step=7)).state == "FAILED"


def test_a_clock_that_was_put_back_holds_nothing_up() -> None:
    row = job("STARTING", stalled=1, submitted_at=NOW + 3600)
    assert answer(row, "FAILED", None).act == "submit"


def test_a_job_that_went_on_unseen_while_it_was_paused_is_done_when_it_is_resumed() -> None:
    assert answer(job("QUEUED"), None, record("SUCCEEDED"), fits=False) == Decision("finish", "SUCCEEDED")


def test_attempts_without_progress_wait_longer_and_longer() -> None:
    for stalled, age_s, act in ((1, 1, "none"), (1, 3, "submit"), (0, 0, "submit")):
        row = job("STARTING", stalled=stalled, submitted_at=NOW - age_s)
        assert decide(row, "FAILED", None, NOW, alive=False, fits=True, max_attempts=5, parents={}).act == act


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
