"""The run folder under the eyes of readers while it is written, killed and resumed."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads import record
from workloads.journal import Journal
from workloads.metrics import MetricsWriter
from workloads.record import RunFolder, write_atomic


def test_a_failed_write_leaves_the_old_text_and_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_points_of_a_resumed_run_replace_those_before_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert list(run.read_metrics()) == []
    first = MetricsWriter(run.metrics)
    for step in (10, 20, 30):
        first.append({"step": step, "epoch": 0, "loss": 1.0})
    first.close()
    with open(run.metrics, "a") as file:
        file.write('{"step": 40, "epo')  # killed in the middle of a line
    second = MetricsWriter(run.metrics)
    second.append({"step": 30, "epoch": 0, "loss": 2.0})
    second.close()
    assert [(p["step"], p["loss"]) for p in run.read_metrics()] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert [p["step"] for p in run.read_metrics(after_step=10)] == [20, 30]


def test_an_unfinished_line_is_not_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 1, "epoch": 0, "loss": 1.0}\n{"step": 2, "epo')
    assert [p["step"] for p in run.read_metrics()] == [1]


def test_events_of_several_processes_are_whole_lines(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_events() == []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: run.event("workers_joined", f"rank {n} " + "x" * 5000), range(64)))
    events = run.read_events()
    assert {int(event["message"].split()[1]) for event in events} == set(range(64))
    assert run.read_events(after=events[40]["offset"]) == events[41:]


@given(cut=st.integers(1, 60))
def test_a_torn_event_is_no_event_and_harms_no_other(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.event("hang", "rank 1")
    run.event("preempted", "node\n2 \u2028")
    whole = run.events.read_bytes()
    os.truncate(run.events, len(whole) - cut)
    kinds = [event["kind"] for event in run.read_events()]
    assert kinds == ["hang"]
    run.event("workers_left", "rank 2")
    assert [event["kind"] for event in run.read_events()][-1] == "workers_left"
    assert len(run.read_events()) == (3 if cut == 1 else 2)  # all but its end of line was there: it is whole again


def test_an_event_is_not_worth_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunFolder(tmp_path / "gone").event("hang", "rank 1")
    assert "an event could not be written" in caplog.text


def test_time_of_training_is_of_all_attempts_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    now = 0.0

    def clock() -> float:
        return now

    for attempt in (1, 2):
        with Journal(run, "j", attempt, max_duration=29.0, clock=clock) as journal:
            now += 100  # importing, waiting for the cluster
            with journal.training():
                now += 100  # opening the data
                run.total_steps.write_text("20")
                journal.update()
                now += 10
                journal.update()
                now += 5
            now += 100  # evaluating
            assert journal.update().ran_s == 15 * attempt and not journal.out_of_time
        now += 1000  # paused
    assert not run.stop.exists()  # the limit was passed when nothing was left to stop
    with Journal(run, "j", 3, max_duration=29.0, clock=clock) as journal, journal.training():
        journal.update()
        assert journal.out_of_time and run.stop.exists()


def test_a_stop_that_was_asked_for_before_is_not_the_limits(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    now = 0.0
    with Journal(run, "j", 1, max_duration=5.0, clock=lambda: now) as journal, journal.training():
        run.total_steps.write_text("20")
        journal.update()
        run.stop.touch()
        now = 6.0
        assert journal.update().ran_s == 6.0 and not journal.out_of_time


def test_journal_tells_the_life_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_record() is None
    run.total_steps.write_text("7")  # of an earlier attempt
    with Journal(run, "job-1", 2) as journal:
        record = run.read_record()
        assert record is not None and (record.state, record.attempt, record.pid) == ("STARTING", 2, os.getpid())
        run.total_steps.write_text("100")
        run.metrics.write_text('{"step": 10, "epoch": 1, "loss": 1.0}\n')
        run.skipped.write_text("b\na\nb\n")
        journal.update()
        record = run.read_record()
        assert record is not None and record.state == "RUNNING"
        assert (record.step, record.epoch, record.total_steps, record.skipped) == (10, 1, 100, ["a", "b"])
        assert record.skipped_samples == 2
        assert record.finished_at is None
        journal.finish("FAILED", "no luck", "try again")
    record = run.read_record()
    assert record is not None and (record.state, record.reason, record.hint) == ("FAILED", "no luck", "try again")
    assert record.finished_at is not None and record.finished_at >= record.started_at


def test_a_look_at_what_is_new_costs_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the curve is."""
    run, parsed = RunFolder(tmp_path), 0
    run.metrics.write_text("".join(f'{{"step": {step}, "note": "{"x" * (step % 300)}"}}\n' for step in range(20_000)))
    loads = json.loads

    def counted(line: bytes) -> object:
        nonlocal parsed
        parsed += 1
        return loads(line)

    monkeypatch.setattr(json, "loads", counted)
    assert [p["step"] for p in run.read_metrics(after_step=19_990)] == list(range(19_991, 20_000))
    last = run.last_point()
    assert last is not None and last["step"] == 19_999
    assert parsed == 10 + 1 + 2  # nothing, behind the last line


@given(
    steps=st.lists(st.integers(0, 9), max_size=12),
    torn=st.sampled_from(["", '{"st', '{"step": 3, "epo\n']),
    block=st.integers(1, 40),
)
def test_a_curve_is_the_same_from_its_end(
    steps: list[int], torn: str, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    points = [{"step": step, "at": at} for at, step in enumerate(steps)]
    run.metrics.write_text("".join(json.dumps(point) + "\n" for point in points) + torn)
    with mock.patch.object(record, "_BLOCK_BYTES", block):
        assert list(run.read_metrics()) == [{p["step"]: p for p in points}[step] for step in sorted({*steps})]
        assert run.last_point() == (points[-1] if points else None)
        behind = points[max((at for at, step in enumerate(steps) if step <= 4), default=-1) + 1 :]
        assert {p["at"] for p in run.read_metrics(after_step=4)} == {
            p["at"] for p in {p["step"]: p for p in behind}.values()
        }
