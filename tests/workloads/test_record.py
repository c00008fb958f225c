"""The run folder under the eyes of readers while it is written, killed and resumed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
        assert record.finished_at is None
        journal.finish("FAILED", "no luck", "try again")
    record = run.read_record()
    assert record is not None and (record.state, record.reason, record.hint) == ("FAILED", "no luck", "try again")
    assert record.finished_at is not None and record.finished_at >= record.started_at
