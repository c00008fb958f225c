"""Evaluations of checkpoints beside the training: which, where, with what numbers, and what they may never do to it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.embedded import Head
from tests.waiting import until
from tests.workloads.test_trackers import curves
from workloads import checkpoint, online
from workloads import checkpoint_folder as files
from workloads.checkpoint_folder import FileSum, Seal
from workloads.online import OnlineEvaluations, due, left, pin, pinned
from workloads.online_child import ChildProcess, evaluate_checkpoint
from workloads.preflight import check
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, execute, run_local
from workloads.spec import JobSpec


@pytest.fixture
def knn(toy_shards: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """An entry of `evaluate`."""

    def make(every: int | None, **more: Any) -> dict[str, Any]:
        data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
        return {"name": "knn", "k": 5, "data": data, "every_checkpoints": every} | more

    return make


@pytest.fixture(scope="module")
def trained(toy_shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The folder of a job of 20 steps with a kNN at its end, and one on each second of four checkpoints."""
    from tests.toy import TOY_MAE, TOY_MODEL

    data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
    document = {"name": "toy", "method": TOY_MAE, "model": TOY_MODEL, "epochs": 2, "batch_size": 8}
    document |= {"data": {"train": data["train"]}, "checkpoint": {"every_steps": 5, "keep": 4}}
    document |= {"evaluate": [{"name": "knn", "data": data}, {"name": "knn", "data": data, "every_checkpoints": 2}]}
    run = RunFolder(tmp_path_factory.mktemp("trained"))
    assert run_local(JobSpec.model_validate(document), run.path) == SUCCEEDED
    return run


def final_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    step = checkpoint.latest_step(run.checkpoints)
    weights: dict[str, torch.Tensor] = torch.load(run.checkpoints / f"step-{step:08d}.pt", weights_only=True)["method"]
    return weights


def seal(run: RunFolder, step: int, text: str = "weights") -> None:
    """A checkpoint as far as its files go: one file, and one in a folder."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    names = [f"{files.stem(step)}/0.distcp", f"{files.stem(step)}/.metadata"]
    for name in names:
        (run.checkpoints / name).parent.mkdir(exist_ok=True)
        (run.checkpoints / name).write_text(text)
    sums: dict[str, FileSum] = {name: files.sum_of(run.checkpoints / name) for name in names}
    files.complete(run.checkpoints, Seal(step=step, files=sums, metric=None, time=0.0))


class Scripted:
    """A `Start`: what happens during the evaluation of each step, in the thread that watches."""

    def __init__(self, during: dict[int, Callable[[], bool]]) -> None:
        self.during, self.started, self.ended = during, list[int](), list[int]()

    def __call__(self, run: RunFolder, step: int, home: Path, job_id: str) -> Scripted:
        assert files.damage(pinned(run, step).checkpoints, _sealed(run, step)) is None
        self.started.append(step)
        return self

    def wait(self, timeout_s: float) -> bool:
        return self.during.get(self.started[-1], lambda: True)()

    def end(self) -> None:
        self.ended.append(self.started[-1])


def _sealed(run: RunFolder, step: int) -> Seal:
    found = files.read_seal(pinned(run, step).checkpoints, step)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(online, "POLL_S", 0.01)
    yield


def test_due_is_each_nth_checkpoint_and_none_that_a_stop_wrote(
    toy_job: Callable[..., JobSpec], knn: Callable[..., dict[str, Any]]
) -> None:
    spec = toy_job(evaluate=[knn(1), knn(None), knn(3)])
    assert {step: due(spec, step) for step in range(32) if due(spec, step)} == {
        **{step: [0] for step in (5, 10, 20, 25)},
        **{step: [0, 2] for step in (15, 30)},
    }


@pytest.mark.parametrize(("every", "words"), [(0, "greater than or equal to 1"), ("often", "valid integer")])
def test_nonsense_is_refused_at_once(
    toy_job: Callable[..., JobSpec], knn: Callable[..., dict[str, Any]], tmp_path: Path, every: object, words: str
) -> None:
    (problem,) = check(toy_job(evaluate=[knn(every)]), tmp_path)  # type: ignore[arg-type]
    assert problem.loc == ["evaluate", 0, "every_checkpoints"] and words in problem.message


def test_in_a_process_of_its_own_the_numbers_are_those_of_the_end(
    toy_job: Callable[..., JobSpec], trained: RunFolder
) -> None:
    spec = JobSpec.model_validate_json(trained.spec.read_text())
    alone = RunFolder(trained.path / "alone")
    assert run_local(spec.model_copy(update={"evaluate": []}), alone.path) == SUCCEEDED
    expected, got = final_weights(alone), final_weights(trained)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    last = trained.read_online()[-1]
    place = {"step": 20, "epoch": 1, "entry": 1, "label": "knn", "metric": "accuracy"}
    at_the_end = trained.read_evaluations()
    assert last == place | at_the_end[0]["results"]["pretrained"]
    assert set(at_the_end[1]["results"]) == {"pretrained", "untrained", "raw_pixels"}
    assert "[online] " in trained.log.read_text() and trained.read_events() == []
    assert not any((trained.path / "online").glob("*"))
    shown = curves(trained.path / "tensorboard" / "online")
    assert shown == {"online/knn": [(r["step"], pytest.approx(r["mean"])) for r in trained.read_online()]}


def test_each_checkpoint_gives_the_numbers_of_its_own_weights(
    toy_job: Callable[..., JobSpec], trained: RunFolder, knn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def entries(*every: int | None) -> list[dict[str, Any]]:
        probe = {"name": "linear_probe", "epochs": 1, "seeds": [0, 1], "labels_per_class": 4, "data": knn(1)["data"]}
        return [knn(every[0]), probe | {"every_checkpoints": every[1]}, knn(every[2])]

    run, spec = RunFolder(tmp_path), toy_job(evaluate=entries(1, 1, 4))
    run.spec.write_text(spec.model_dump_json())
    for step in (10, 20):
        assert left(spec, run, step) == ([0, 1, 2] if step == 20 else [0, 1])
        pin(trained.checkpoints, step, pinned(run, step).checkpoints)
        evaluate_checkpoint(run, step, tmp_path, "j")
        assert left(spec, run, step) == []
        evaluate_checkpoint(run, step, tmp_path, "j")  # nothing is evaluated twice
    got = run.read_online()
    assert [(r["step"], r["entry"], r["label"]) for r in got] == [
        *[(10, 0, "knn"), (10, 1, "probe4")],
        *[(20, 0, "knn"), (20, 1, "probe4"), (20, 2, "knn")],
    ]
    ended = RunFolder(tmp_path / "ended")  # a job that ends at step 10
    pin(trained.checkpoints, 10, ended.checkpoints)
    assert execute(toy_job(epochs=1, evaluate=entries(None, None, None)), ended, tmp_path, job_id="e") == SUCCEEDED
    expected = [result["results"]["pretrained"] for result in ended.read_evaluations()]
    assert [{key: r[key] for key in ("mean", "std", "seeds")} for r in got[:2]] == expected[:2]


def test_a_failure_is_an_event_and_the_others_are_evaluated(
    toy_job: Callable[..., JobSpec], trained: RunFolder, knn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    gone = {"train": {"shards": "/gone.tar"}, "test": {"shards": "/gone.tar"}}
    run = RunFolder(tmp_path)
    run.spec.write_text(toy_job(evaluate=[knn(1, data=gone), knn(1)]).model_dump_json())
    pin(trained.checkpoints, 20, pinned(run, 20).checkpoints)
    evaluate_checkpoint(run, 20, tmp_path, "j")
    (event,) = run.read_events()
    assert event["kind"] == "evaluation_failed" and "knn of the checkpoint of step 20" in event["message"]
    assert [result["entry"] for result in run.read_online()] == [1]
    damaged = pinned(run, 10).checkpoints
    pin(trained.checkpoints, 10, damaged)
    (damaged / "step-00000010.pt").unlink()  # the link only
    (damaged / "step-00000010.pt").write_bytes(b"x")
    evaluate_checkpoint(run, 10, tmp_path, "j")
    assert "damaged" in run.read_events()[-1]["message"] and len(run.read_online()) == 1


def test_the_newest_that_is_due_is_next_and_stays_though_it_is_removed(
    toy_job: Callable[..., JobSpec], knn: Callable[..., dict[str, Any]], tmp_path: Path, caplog: Any
) -> None:
    run = RunFolder(tmp_path)
    spec = toy_job(evaluate=[knn(1)])

    def more() -> bool:
        for step in (10, 15, 17, 20):
            seal(run, step)
        files.prune(run.checkpoints, spec.checkpoint.model_copy(update={"keep": 1}), 20)
        assert [s for s in (5, 10, 15, 17, 20) if files.read_seal(run.checkpoints, s)] == [20]
        assert files.damage(pinned(run, 5).checkpoints, _sealed(run, 5)) is None
        return True

    start = Scripted({5: more})
    seal(run, 5)
    caplog.set_level("INFO")
    with OnlineEvaluations(spec, run, tmp_path, "j", start):
        pass  # what goes on is waited for, and so is what is due then
    assert start.started == [5, 20] and start.ended == []
    assert "2 checkpoints before step 20 are not evaluated" in caplog.text
    assert not any((run.path / "online").glob("*"))


@pytest.mark.parametrize("by", ["stop", "failure"])
def test_a_stop_or_the_failure_of_the_training_ends_it(
    toy_job: Callable[..., JobSpec], knn: Callable[..., dict[str, Any]], tmp_path: Path, by: str
) -> None:
    run = RunFolder(tmp_path)
    start = Scripted({5: lambda: False})
    seal(run, 5)
    watching = OnlineEvaluations(toy_job(evaluate=[knn(1)]), run, tmp_path, "j", start)
    if by == "stop":
        with watching:
            while not start.started:
                pass
            run.stop.touch()
    else:
        with pytest.raises(ValueError, match="diverged"), watching:
            while not start.started:
                pass
            raise ValueError("diverged")
    assert start.ended == [5] and not any((run.path / "online").glob("*"))


def test_a_process_that_dies_is_an_event_and_the_training_goes_on(
    toy_job: Callable[..., JobSpec], knn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)

    def die() -> bool:
        seal(run, 10)
        raise RuntimeError("its process ended with -9, see the log")

    start = Scripted({5: die})
    seal(run, 5)
    with OnlineEvaluations(toy_job(evaluate=[knn(1)]), run, tmp_path, "j", start):
        pass
    assert start.started == [5, 10]
    (event,) = run.read_events()
    assert event["kind"] == "evaluation_failed" and "step 5: its process ended with -9" in event["message"]


def test_a_resumed_run_evaluates_what_is_left_and_cleans_up(
    toy_job: Callable[..., JobSpec], knn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    spec = toy_job(evaluate=[knn(1), knn(2)], checkpoint={"every_steps": 5, "keep": 4})
    for done, expected in (([], [10]), ([(5, 0)], [10]), ([(10, 0)], [10]), ([(10, 0), (10, 1)], [])):
        run = RunFolder(tmp_path / str(len(done)) / str(done[:1]))
        seal(run, 5)
        seal(run, 10)
        with open(run.online, "w") as file:
            known = {"label": "knn", "mean": 0.5}
            file.writelines(json.dumps(known | {"step": step, "entry": entry}) + "\n" for step, entry in done)
            file.write('{"step": 10, "en')  # killed while it wrote
        pin(run.checkpoints, 10, pinned(run, 10).checkpoints)  # left by the attempt that was killed
        start = Scripted({})
        with OnlineEvaluations(spec, run, tmp_path, "j", start):
            pass
        assert start.started == expected, done
        assert not any((run.path / "online").glob("*"))


def test_nothing_is_started_where_nothing_is_asked_for(
    toy_job: Callable[..., JobSpec], knn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    start = Scripted({})
    seal(RunFolder(tmp_path), 5)
    with OnlineEvaluations(toy_job(evaluate=[knn(None)]), RunFolder(tmp_path), tmp_path, "j", start) as watching:
        assert watching._thread is None
    assert start.started == []


def test_where_there_are_no_links_a_checkpoint_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    run = RunFolder(tmp_path / "run")
    seal(run, 5)
    monkeypatch.setattr("os.link", refuse)
    pin(run.checkpoints, 5, tmp_path / "copy")
    assert files.damage(tmp_path / "copy", _of(tmp_path / "copy")) is None and files.latest_step(tmp_path / "copy") == 5
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 6"):
        pin(run.checkpoints, 6, tmp_path / "other")


def _of(folder: Path) -> Seal:
    found = files.read_seal(folder, 5)
    assert found is not None
    return found


def test_a_child_whose_parent_is_gone_ends_itself() -> None:
    script = "import time\nfrom workloads.online_child import end_with\nend_with(-1)\ntime.sleep(60)"
    done = subprocess.run([sys.executable, "-c", script], process_group=0, timeout=50, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_child_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nsleep 60 & echo $! >&2\nwait\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    run = RunFolder(tmp_path)
    child = ChildProcess(run, 5, tmp_path, "j")
    while not run.log.read_text().endswith("\n"):
        assert not child.wait(0.01)
    child.end()
    grandchild, deadline = int(run.log.read_text()), time.monotonic() + 30
    while psutil.pid_exists(grandchild) and psutil.Process(grandchild).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline  # it would sleep for longer
    with pytest.raises(RuntimeError, match="ended with -9"):
        child.wait(1)


@pytest.mark.ray
def test_on_the_cluster_it_is_a_task_that_can_be_ended(
    cluster: Head,
    toy_job: Callable[..., JobSpec],
    trained: RunFolder,
    knn: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import TaskCancelledError, WorkerCrashedError

    from workloads import ray_online
    from workloads.ray_online import ClusterTask

    def forever(run: str, *_: Any) -> None:
        Path(run, "begun").touch()
        time.sleep(10**6)

    run = RunFolder(tmp_path)
    run.spec.write_text(toy_job(evaluate=[knn(1)]).model_dump_json())
    pin(trained.checkpoints, 20, pinned(run, 20).checkpoints)
    task = ClusterTask(run, 20, tmp_path, "j")
    while not task.wait(1.0):
        pass
    assert [(result["step"], result["entry"]) for result in run.read_online()] == [(20, 0)]
    monkeypatch.setattr(ray_online, "evaluate_apart", forever)
    other = ClusterTask(run, 15, tmp_path, "j")
    until(lambda: other.wait(0.1) or (tmp_path / "begun").exists(), "it evaluates")
    other.end()
    with pytest.raises((TaskCancelledError, WorkerCrashedError)):
        other.wait(10)


def test_without_its_checkpoint_nothing_is_evaluated(
    toy_job: Callable[..., JobSpec], knn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    run.spec.write_text(toy_job(evaluate=[knn(1)]).model_dump_json())
    evaluate_checkpoint(run, 15, tmp_path, "j")
    assert list(run.read_online()) == []
    (event,) = run.read_events()
    assert event["kind"] == "evaluation_failed" and "no checkpoint of step 15" in event["message"]
