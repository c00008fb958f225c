"""A job on the terminal: plain lines in a pipe, a bar on a terminal, honest about what it does not know."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from service import progress
from service.progress import JobProgress, Pace, bar_on, duration, follow, job_progress, note_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def job(step: int = 0, state: str = "RUNNING", attempt: int = 1, total: int = 100) -> dict[str, Any]:
    known = {"id": "job-1", "state": state, "attempt": attempt, "evaluations": [], "spec": {"evaluate": [{}, {}]}}
    return known | {"progress": {"step": step, "total_steps": total, "epoch": 0}}


def point(step: int, **more: Any) -> dict[str, Any]:
    known = {"epoch": 0, "loss": 0.5, "samples_per_s": 812.3, "data_wait_share": 0.031, "step_time_s": 2.0}
    return {"step": step} | known | more


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=140)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def last_line(bar: Progress, console: Console) -> str:
    bar.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(console)).replace("\r", "\n").splitlines()[-1]


def test_in_a_pipe_a_line_has_all_and_comes_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    show = JobProgress(None, clock)
    show(job(10), point(10))
    for step, clock.now in ((20, 1.0), (30, 2.9), (40, 3.1), (50, 5.0)):
        show(job(step), point(step))
    for clock.now in (9.0, 20.0):  # the point of 5.0 has its line; nothing new has none
        show(job(50), None)
    assert capsys.readouterr().out.splitlines() == [
        "job-1 running step 10/100 epoch 0  loss 0.5000  812 samples/s  data wait 3%  eta 3m00s",
        "job-1 running step 40/100 epoch 0  loss 0.5000  812 samples/s  data wait 3%  eta 2m00s",
        "job-1 running step 50/100 epoch 0  loss 0.5000  812 samples/s  data wait 3%  eta 1m36s",
    ]


def test_a_new_phase_is_said_at_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    show = JobProgress(None, clock)
    show(job(state="QUEUED", total=0))
    show(job(state="STARTING", total=0))
    show(job(100), point(100))
    show(job(100, state="SUCCEEDED"))
    assert [line.split(" epoch")[0] for line in capsys.readouterr().out.splitlines()] == [
        "job-1 queued step 0/?",
        "job-1 starting step 0/?",
        "job-1 evaluating step 100/100 0 of 2 evaluations done",
        "job-1 succeeded step 100/100",
    ]


def test_each_line_is_one_write(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    pipe = io.StringIO()
    monkeypatch.setattr(pipe, "write", writes.append)
    monkeypatch.setattr(sys, "stdout", pipe)
    JobProgress(None, clock)(job(10), point(10))
    assert len(writes) == 1 and writes[0].count("\n") == 1 and writes[0].endswith("\n")


@given(st.dictionaries(st.sampled_from([name for name, _ in progress._SHOWN]), st.none() | st.floats(0, 1e12)))
def test_a_note_takes_any_point(fields: dict[str, float | None]) -> None:
    note = note_of({"step": 1} | fields)
    assert "None" not in note and ("loss" in note) == (fields.get("loss") is not None)


def test_numbers_keep_their_digits() -> None:
    assert note_of({"loss": 1.5e-5, "samples_per_s": 0.25}) == "loss 1.5e-05  0.25 samples/s"
    assert note_of({"loss": None, "samples_per_s": 1234567.0, "skipped_steps": 10}) == (
        "1,234,567 samples/s  10 steps skipped"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (356400, "4d03h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_pace_is_of_this_attempt_and_ignores_outliers() -> None:
    pace = Pace()
    assert pace.step_s() is None
    for step in (10, 20, 30):
        pace.add(1, point(step, step_time_s=8.0))
    pace.add(2, point(20, step_time_s=300.0))  # compiles
    for step in (30, 40, 40, 50):  # one is seen twice
        pace.add(2, point(step, step_time_s=2.0))
    assert pace.step_s() == 2.0
    pace.add(2, point(60, step_time_s=None))
    pace.add(2, {"step": 70})
    assert pace.step_s() == 2.0
    pace.add(2, point(40, step_time_s=1.0))  # back to a checkpoint, on another machine
    assert pace.step_s() == 1.0


def test_a_resumed_run_counts_its_own_steps_only(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    show = JobProgress(None, clock)
    show(job(90, state="STARTING"), point(90, step_time_s=500.0))  # of the attempt before
    show(job(90), None)
    assert "eta" not in capsys.readouterr().out
    clock.now = 10.0
    show(job(91), point(91, step_time_s=2.0))
    assert "eta 18s" in capsys.readouterr().out


def test_the_bar_counts_down_between_points(clock: Clock, screen: Console) -> None:
    with bar_on(screen, clock) as bar:
        show = JobProgress(bar, clock)
        assert "0/?" in last_line(bar, screen)
        show(job(50), point(50))
        for word in ("running", "50/100", "eta 1m40s", "epoch 0", "loss 0.5000", "812 samples/s", "data wait 3%"):
            assert word in last_line(bar, screen)
        clock.now = 30.0
        show(job(50), None)  # somebody looked, there was nothing new
        assert "eta 1m10s" in last_line(bar, screen)
        clock.now = 1000.0
        assert "eta 0s" in last_line(bar, screen)
        show(job(100, state="SUCCEEDED"), None)
        assert "succeeded" in last_line(bar, screen) and "eta" not in last_line(bar, screen)


def test_a_narrow_terminal_cuts_the_note_only(clock: Clock) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=50)
    with bar_on(screen, clock) as bar:
        JobProgress(bar, clock)(job(50, total=125000), point(50))
        line = last_line(bar, screen)
    assert len(line) <= 50 and "50/125000" in line and "eta 2d21h" in line and "epoch 0" in line


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_the_cursor_comes_back_however_it_ends(
    end: type[BaseException], screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "out", screen)
    with pytest.raises(end), job_progress() as show:
        show(job(50), point(50))
        raise end
    assert written(screen).rindex("\x1b[?25h") > written(screen).rindex("\x1b[?25l")
    assert sys.stderr is not None and type(sys.stderr).__name__ != "FileProxy"


class Client:
    """Answers of a service, one after the other; a metrics call gives what the curve held then."""

    def __init__(self, answers: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
        self.answers, self.asked = answers, 0

    def wait(self, job_id: str, on_update: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        for answer, points in self.answers:
            self.points = points
            on_update(answer)
        return answer

    def metrics(self, job_id: str, after_step: int) -> list[dict[str, Any]]:
        self.asked += 1
        return [p for p in self.points if p["step"] > after_step]


def test_following_a_job_that_went_back_to_a_checkpoint(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [point(step, loss=float(step)) for step in (10, 20, 30)]
    again = [before[0], point(20, loss=0.25), before[2]]  # step 30 is still of the attempt that was killed
    client = Client(
        [
            (job(30), before),
            (job(30), before),
            (job(30, state="QUEUED"), before),
            (job(20, attempt=2), again),
            (job(100, state="FAILED", attempt=2), again),
        ]
    )
    assert follow(client, "job-1")["state"] == "FAILED"  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert "step 30/100 epoch 0  loss 30.0000" in lines[0]
    assert "running step 20/100 epoch 0  loss 0.2500" in lines[2]
    assert "failed" in lines[-1] and client.asked == 3
