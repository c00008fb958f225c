"""The driver of a job of one worker is told that its node goes, without being connected to Ray."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster.embedded import Head
from tests.waiting import until
from tests.workloads.ray_paced import end_node, node
from workloads import checkpoint_folder, ray_notice
from workloads.place import Here
from workloads.ray_notice import notice, own_node
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.work import Work

SPOT, OTHER = "5b07", "0dd5"


@pytest.fixture
def on_spot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_notice, "POLL_S", 0.001)
    monkeypatch.setattr(ray_notice, "own_node", lambda: SPOT)
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)


class Family:
    """Stands in for psutil.Process: the words of each ancestor, the nearest first."""

    def __init__(self, *ancestors: list[str] | Exception) -> None:
        self._ancestors = ancestors

    def parents(self) -> list[Any]:
        return [SimpleNamespace(cmdline=partial(self._words, words)) for words in self._ancestors]

    @staticmethod
    def _words(words: list[str] | Exception) -> list[str]:
        if isinstance(words, Exception):
            raise words
        return words


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (Family(["sh", "-c"], ["ray::JobSupervisor", ""], ["raylet", "--x=1", f"--node_id={SPOT}"], ["init"]), SPOT),
        (Family(["bash"], ["init"]), None),
        (Family(["sh", "-c"], psutil.AccessDenied(), ["raylet", f"--node_id={SPOT}"]), None),
    ],
)
def test_the_own_node_is_that_of_the_raylet_above(
    family: Family, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "Process", lambda: family)
    assert own_node() == expected


def test_it_is_told_once_however_often_ray_does_not_answer(
    on_spot: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[dict[str, int] | Exception] = [{}, OSError("away"), OSError("away"), {OTHER: 0}, {SPOT: 0, OTHER: 0}]

    def draining() -> dict[str, int]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray_notice, "draining", draining)
    run = RunFolder(tmp_path)
    with notice(run) as preempted:
        told = preempted.__self__  # type: ignore[attr-defined]
        assert told.wait(10) and preempted()
    assert answers == []
    assert [(event["kind"], SPOT in event["message"]) for event in run.read_events()] == [("preempted", True)]
    assert [record.message.count("away") for record in caplog.records if record.levelname == "WARNING"] == [1]


@pytest.mark.parametrize("why", ["no cluster", "one machine"])
def test_nobody_asks_where_there_is_nothing_to_be_told(
    on_spot: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread that asks"))
    if why == "no cluster":
        monkeypatch.setattr(ray_notice, "own_node", lambda: None)
    else:
        monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    with notice(RunFolder(tmp_path)) as preempted:
        assert not preempted()


@pytest.mark.parametrize("ray", [True, False])
def test_a_job_of_one_worker_saves_each_step_from_the_notice_on(
    ray: bool, toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RunFolder] = []

    @contextlib.contextmanager
    def third_time(run: RunFolder) -> Iterator[Callable[[], bool]]:
        yield lambda: asked.append(run) or len(asked) >= 3

    monkeypatch.setattr(ray_notice, "notice", third_time)
    run = RunFolder(tmp_path / "run")
    spec = toy_job(epochs=None, steps=6, checkpoint={"every_steps": 1000, "keep": 6})
    place = Work(spec, run, tmp_path, "job", ray, should_stop=lambda: False, connected=lambda: None)._place()
    assert isinstance(place, Here) and place.train(spec, run)
    assert sorted(checkpoint_folder.steps(run.checkpoints)) == ([3, 4, 5, 6] if ray else [6])
    assert asked == [run] * 3 * ray


@pytest.mark.ray
@pytest.mark.soak
def test_the_driver_on_a_drained_node_loses_at_most_one_step(
    cluster: Head, toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    """Placed by Ray Jobs, told by Ray's control plane: what the other tests stand in for."""
    import ray
    from ray.job_submission import JobSubmissionClient

    spec = toy_job(epochs=None, steps=100_000, log_steps=1, checkpoint={"every_steps": 100_000})
    (tmp_path / "job.json").write_text(spec.model_dump_json())
    run = RunFolder(tmp_path / "runs" / "job")
    environment = {"MANTA_HOME": str(tmp_path), "MANTA_JOB_ID": "job", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
    with node(cluster, tmp_path, "spot") as spot:
        (spot_id,) = (one["NodeID"] for one in ray.nodes() if one["Alive"] and "spot" in one["Resources"])
        JobSubmissionClient(cluster.dashboard_url).submit_job(
            entrypoint=shlex.join([sys.executable, "-m", "workloads.run", str(tmp_path / "job.json")]),
            runtime_env={"env_vars": environment},
            entrypoint_resources={"spot": 1},
        )
        until(lambda: run.last_point())
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
        drain += ["--node-id", spot_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*drain, "--deadline-remaining-seconds", "60"], check=True, capture_output=True)
        until(lambda: run.read_events())
        saved = until(lambda: checkpoint_folder.latest_step(run.checkpoints))
        until(lambda: (checkpoint_folder.latest_step(run.checkpoints) or 0) > saved + 3)
        end_node(spot)
    (told,) = run.read_events()
    assert told["kind"] == "preempted" and spot_id in told["message"]
    last, latest = run.last_point(), checkpoint_folder.latest_step(run.checkpoints)
    assert last is not None and latest is not None and last["step"] - latest <= 1
