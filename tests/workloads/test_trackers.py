"""Copies of the curve for other tools: complete and one curve after kills, and never in the way of the loop."""

from __future__ import annotations

import json
import logging
import struct
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import Event, current_thread
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads import trackers
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.trackers import Background, TensorBoard, scalars_of, trackers_of

SPEC = JobSpec.model_validate(
    {
        "name": "toy",
        "method": {"name": "mae", "mask_ratio": 0.5},
        "model": {"name": "vit"},
        "data": {"train": {"shards": ["a.tar", "b.tar"]}},
        "steps": 30,
        "evaluate": [{"name": "knn", "data": {"train": {"shards": "x" * 900}}}],
    }
)


def point(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "loss": 1.0 / step, "lr": 1e-3, "samples_per_s": 100.0} | more


def events(file: Path) -> Iterator[Any]:
    """Messages of an event file; every frame is whole and its checksums hold."""
    from tensorboardX.proto.event_pb2 import Event as Message
    from tensorboardX.record_writer import masked_crc32c

    data = file.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        frame, data = data[: 16 + length], data[16 + length :]
        assert struct.unpack("<I", frame[8:12]) == (masked_crc32c(frame[:8]),)
        assert struct.unpack("<I", frame[-4:]) == (masked_crc32c(frame[12:-4]),)
        yield Message.FromString(frame[12:-4])


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: files by name, and START drops its step and later ones."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.iterdir()):
        first, *rest = events(file)
        assert first.file_version == "brain.Event:2"
        for event in rest:
            if event.HasField("session_log"):
                shown = {tag: [p for p in points if p[0] < event.step] for tag, points in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRACKING_URI", "EXPERIMENT_NAME", "EXPERIMENT_ID", "RUN_ID", "RUN_NAME"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "total_steps").write_text("30")
    return RunFolder(tmp_path)


def train(run: RunFolder, start: int, steps: list[int], job_id: str = "job-1") -> None:
    all_trackers = trackers_of(SPEC, run, job_id, start)
    for step in steps:
        for tracker in all_trackers:
            tracker.point(point(step))
    for tracker in all_trackers:
        tracker.close()


def test_names_say_whether_model_or_machine() -> None:
    full = point(10, loss=None, grad_norm=2, data_wait_share=0.1, note="text", bad=True) | {"online/knn": 0.5, "a@b": 1}
    assert scalars_of(full) == {
        "train/epoch": 0.0,
        "train/lr": 1e-3,
        "engine/samples_per_s": 100.0,
        "train/grad_norm": 2.0,
        "engine/data_wait_share": 0.1,
        "online/knn": 0.5,
        "train/a_b": 1.0,
    }


def test_event_files_hold_the_points(run: RunFolder) -> None:
    train(run, 0, [10, 20, 30])
    shown = curves(run.path / "tensorboard")
    assert [step for step, _ in shown["train/loss"]] == [10, 20, 30]
    assert [value for _, value in shown["train/loss"]] == pytest.approx([1 / 10, 1 / 20, 1 / 30])
    assert shown["engine/samples_per_s"] == [(10, 100.0), (20, 100.0), (30, 100.0)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_killed_and_resumed_attempts_are_one_curve(attempts: list[tuple[int, int]]) -> None:
    """Each attempt starts at a checkpoint, no later than what the one before reached, and is killed unclosed."""
    with tempfile.TemporaryDirectory() as name:
        reached = 0
        for start, length in attempts:
            start = min(start, reached)
            board = TensorBoard(Path(name), start)
            for step in range(start + 1, start + length + 1):
                board.write(step, {"train/loss": float(step)}, 0.0)
            board._file.close()  # the process is gone; nothing was kept back
            reached = start + length
        assert curves(Path(name)).get("train/loss", []) == [(step, float(step)) for step in range(1, reached + 1)]


class Server:
    """Stands for MLflow: the module, its client and what the server holds."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, str] = {}
        self.away = False
        self.threads: set[str] = set()

    def module(self) -> ModuleType:
        module = ModuleType("mlflow")
        module.__spec__ = ModuleSpec("mlflow", None)
        module.MlflowClient = lambda: self  # type: ignore[attr-defined]
        module.entities = SimpleNamespace(  # type: ignore[attr-defined]
            Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, at=timestamp, step=step),
            Param=lambda key, value: (key, value),
        )
        return module

    def _asked(self) -> None:
        self.threads.add(current_thread().name)
        if self.away:
            raise ConnectionError("the server is away")

    def get_experiment_by_name(self, name: str) -> Any:
        self._asked()
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = f"id-{name}"
        return self.experiments[name]

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        self._asked()
        run_id = f"run-{len(self.runs)}"
        self.adopt(run_id, experiment_id, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def adopt(self, run_id: str, experiment_id: str = "0", name: str = "") -> None:
        self.runs[run_id] = {"experiment": experiment_id, "name": name, "params": {}, "metrics": [], "tags": {}}

    def update_run(self, run_id: str, status: str) -> None:
        self._asked()
        self.runs[run_id]["status"] = status

    set_terminated = update_run

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.runs[run_id]["tags"][key] = value

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self._asked()
        held = self.runs[run_id]["params"]
        for key, value in params:
            assert held.setdefault(key, value) == value and len(value) <= 500 and len(params) <= 100
        self.runs[run_id]["metrics"] += metrics

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self.runs[run_id]["metrics"] if metric.key == key]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setitem(sys.modules, "mlflow", server.module())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example")
    return server


def losses(server: Server, run_id: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in server.get_metric_history(run_id, "train/loss")]


def test_mlflow_gets_params_tags_and_metrics(server: Server, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")
    train(run, 0, [10, 20, 30])
    held = server.runs["run-0"]
    assert (held["experiment"], held["name"], held["status"]) == ("id-digits", "toy", "FINISHED")
    assert held["tags"] == {"manta.job_id": "job-1"}
    assert held["params"]["method.mask_ratio"] == "0.5" and held["params"]["optimizer.betas"] == "(0.9, 0.95)"
    assert held["params"]["evaluate.0.data.train.shards"] == "x" * 500
    assert losses(server, "run-0") == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]
    assert server.threads == {"tracker-MLflow"}, "the loop itself never talks to the server"
    assert "secret" not in (run.path / "mlflow.json").read_text()


def test_a_resumed_job_continues_its_run_and_repeats_no_point(server: Server, run: RunFolder) -> None:
    train(run, 0, [10, 20])
    assert server.runs["run-0"]["status"] == "KILLED"
    train(run, 10, [20, 30])
    assert list(server.runs) == ["run-0"] and server.runs["run-0"]["status"] == "FINISHED"
    assert [step for step, _ in losses(server, "run-0")] == [10, 20, 30]


def test_a_run_that_the_environment_names_is_used(
    server: Server, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.adopt("theirs")
    monkeypatch.setenv("MLFLOW_RUN_ID", "theirs")
    train(run, 0, [10])
    assert list(server.runs) == ["theirs"] and len(losses(server, "theirs")) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://another.example")  # knows nothing of that run
    monkeypatch.delenv("MLFLOW_RUN_ID")
    train(run, 0, [10])
    assert json.loads((run.path / "mlflow.json").read_text()) == {
        "server": "https://another.example",
        "run_id": "run-1",
    }


def test_points_of_a_server_that_is_away_are_counted_and_later_ones_arrive(
    server: Server, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    server.away, asked = True, Event()
    tracker = Background("MLflow", lambda: asked.set() or trackers.MLflow(SPEC, run, "job-1"))  # type: ignore[func-returns-value]
    tracker.point(point(10))
    assert asked.wait(5)
    tracker.point(point(20))
    while tracker._lost < 2:
        asked.wait(0.001)
    server.away = False
    tracker.point(point(30))
    tracker.close()
    assert losses(server, "run-0") == [(30, 1 / 30)]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2 and "the server is away" in said[0] and "lacks 2 points" in said[1]


def test_a_server_that_hangs_does_not_hold_the_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "MAX_WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.01)
    opening, answer = Event(), Event()

    def hang() -> Any:
        opening.set()
        assert answer.wait(5)
        raise ConnectionError("gave up")

    tracker = Background("MLflow", hang)
    tracker.point(point(1))
    assert opening.wait(5)
    for step in range(2, 11):  # 3 wait, 6 find no room
        tracker.point(point(step))
    tracker.close()
    assert "lacks 9 points" in caplog.records[-1].getMessage()
    answer.set()
    tracker._thread.join(5)
    assert not tracker._thread.is_alive()


def test_a_full_disk_stops_nothing(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    (run.path / "tensorboard").write_text("in the way")
    train(run, 0, [10, 20])
    assert "lacks 2 points" in caplog.text


def test_what_is_not_installed_is_said(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "find_spec", {}.get)
    assert trackers_of(SPEC, run, "job-1", 0) == []
    assert "pip install tensorboardX" in caplog.text and "mlflow" not in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert trackers_of(SPEC, run, "job-1", 0) == []
    assert "pip install mlflow" in caplog.text


def test_nothing_is_opened_before_the_first_point(run: RunFolder, server: Server) -> None:
    train(run, 0, [])
    assert not (run.path / "tensorboard").exists() and not server.runs
