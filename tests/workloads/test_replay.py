"""A slice of a run made again: equal where it is, told where it is not, and nothing left or changed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.toy import TOY_MAE, TOY_MODEL, write_shards
from workloads import checkpoint_folder, checkpoint_state, provenance
from workloads.record import RunFolder, write_atomic
from workloads.replay import replay
from workloads.replay_plan import ReplayError, find, own_points, plan, slice_of
from workloads.replay_report import Report, Weights, compare_curves, compare_weights
from workloads.spec import JobSpec
from workloads.train import train

Make = Callable[..., JobSpec]


def trained(spec: JobSpec, folder: Path) -> RunFolder:
    run = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    write_atomic(run.spec, spec.model_dump_json())
    assert train(spec, run, folder)
    return run


def again(run: RunFolder, first: int, last: int) -> Report:
    return replay(plan(run, first, last), run.path)


def change(path: Path, edit: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def multiply_loss(run: RunFolder, step: int, factor: float) -> None:
    points = list(run.read_metrics())
    next(point for point in points if point["step"] == step)["loss"] *= factor
    run.metrics.write_text("".join(json.dumps(point) + "\n" for point in points))


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """One thread, and no changes of the checkout, which somebody may be making: they lower what is expected."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "_commit", lambda _: {"commit": "abc", "dirty": False})
        yield


@pytest.fixture(scope="module")
def original(toy_shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """20 steps with points at 3 5 6 9 10 12 15 18 20 and checkpoints of 15 and 20."""
    document = {
        "name": "toy",
        "method": TOY_MAE,
        "model": TOY_MODEL,
        "data": {"train": {"shards": toy_shards["train"]}},
    }
    document |= {"epochs": 2, "batch_size": 8, "optimizer": {"lr": 1e-3}, "schedule": {"warmup_epochs": 0.5}}
    document |= {"checkpoint": {"every_steps": 5}, "log_steps": 3}
    return trained(JobSpec.model_validate(document), tmp_path_factory.mktemp("original"))


@pytest.fixture
def run(original: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it to spoil."""
    return RunFolder(Path(shutil.copytree(original.path, tmp_path / "run")))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_a_kept_checkpoint_all_is_bit_equal_and_the_run_untouched(
    original: RunFolder, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    before, seen = contents(original.path), []

    def on_point(point: dict[str, Any]) -> None:
        assert "MLFLOW_TRACKING_URI" not in os.environ  # no server hears of it
        seen.append(point["step"])

    report = replay(plan(original, 15, 20), original.path, on_point)
    assert report.equal and report.expected == "bit-equal" and report.environment == report.notes == []
    assert report.trained == "5 steps from the checkpoint of step 15" and seen == [18, 20]
    assert report.curve.points == 2 and report.curve.first_difference is None and report.weights == Weights()
    assert dict(report.rows())["result"] == "equal"
    assert contents(original.path) == before and list(scratch.iterdir()) == []
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:1"


def test_without_a_checkpoint_it_begins_at_the_start(original: RunFolder) -> None:
    planned = plan(original, 4, 13)
    assert planned.cost == "13 steps from the start: no checkpoint up to step 4 is kept"
    assert planned.compared == [5, 6, 9, 10, 12]
    report = replay(planned, original.path)
    assert report.equal and report.weights is None and report.curve.points == 5


def test_a_curve_that_was_tampered_with_is_told_at_its_step(run: RunFolder) -> None:
    multiply_loss(run, 18, 1 + 1e-9)
    report = again(run, 15, 20)
    difference = report.curve.first_difference
    assert not report.equal and difference is not None
    assert (difference["step"], difference["name"]) == (18, "loss") and difference["run"] != difference["replay"]
    assert report.curve.largest == {"loss": pytest.approx(1e-9, rel=1e-3), "grad_norm": 0, "lr": 0}
    assert dict(report.rows())["result"] == "NOT equal"


def test_weights_that_were_tampered_with_are_told_by_name(run: RunFolder) -> None:
    path = run.checkpoints / "step-00000020.pt"
    state = torch.load(path, weights_only=True)
    state["method"]["decoder.mask_token"].view(-1)[3] += 0.5
    seal = checkpoint_folder.read_seal(run.checkpoints, 20)
    assert seal is not None
    sealed = seal.model_copy(update={"files": {path.name: checkpoint_state.write(path, state)}})
    checkpoint_folder.complete(run.checkpoints, sealed)
    report = again(run, 15, 20)
    assert not report.equal and report.curve.first_difference is None
    assert report.weights == Weights("decoder.mask_token", pytest.approx(0.5))


def test_a_damaged_checkpoint_is_passed_over(run: RunFolder) -> None:
    (run.checkpoints / "step-00000015.pt").write_bytes(b"half")
    report = again(run, 15, 20)
    assert report.equal and report.trained.startswith("20 steps from the start")
    assert report.notes and "step 15 is passed over" in report.notes[0]


def test_workers_become_micro_batches_within_the_tolerance(run: RunFolder, tmp_path: Path) -> None:
    """The run summed whole batches; its replay, told of two workers, sums halves."""

    def two_workers(document: dict[str, Any]) -> None:
        document["resources"]["workers"] = 2
        document["checkpoint"]["mirror"] = str(tmp_path / "mirror")

    change(run.spec, two_workers)
    report = again(run, 0, 20)
    assert report.equal and report.expected.startswith("within 0.0001 relative: 2 workers become micro-batches")
    assert report.curve.first_difference is not None and 0 < max(report.curve.largest.values()) < 1e-4
    assert "spec.resources.workers was 1, is 2" in report.environment
    assert not (tmp_path / "mirror").exists()  # that is the run's own
    multiply_loss(run, 20, 1.001)
    assert not again(run, 15, 20).equal


def test_another_environment_is_told_and_only_tolerance_expected(run: RunFolder) -> None:
    change(run.provenance, lambda entries: entries[-1]["packages"].update(torch="1.0"))
    report = again(run, 15, 20)
    assert report.equal and report.expected == "within 0.0001 relative: the environment differs"
    assert [line for line in report.environment if line.startswith('packages.torch was "1.0"')] == report.environment
    run.provenance.unlink()
    assert "no provenance.json" in plan(run, 15, 20).environment[0]


def test_a_longer_duration_is_no_other_environment(run: RunFolder) -> None:
    change(run.spec, lambda document: document.update(max_duration=60.0))
    assert plan(run, 15, 20).inexact == []


def test_other_data_are_refused_before_training(toy_job: Make, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    spec = toy_job(data={"train": {"shards": write_shards(data, "t", 16, 1)}}, epochs=None, steps=2)
    run = trained(spec, tmp_path / "run")
    assert plan(run, 0, 2).compared == [2]
    write_shards(data, "t", 24, 1)
    with pytest.raises(ReplayError, match=r"cannot be read: got .* bytes, expected"):
        plan(run, 0, 2)
    next(data.glob("*.parquet")).unlink()  # as `manta inspect --rebuild` does
    with pytest.raises(ReplayError, match=r"other data: got train with 24 samples .* expected the 16 samples"):
        plan(run, 0, 2)


def test_points_around_a_stop_stand_for_other_steps(toy_job: Make, tmp_path: Path) -> None:
    spec, run = toy_job(log_steps=3, epochs=None, steps=12), RunFolder(tmp_path)
    polls = iter(range(1, 8))
    assert not train(spec, run, tmp_path, should_stop=lambda: next(polls) == 7)
    trained(spec, tmp_path)
    assert [point["step"] for point in run.read_metrics()] == [3, 5, 6, 7, 9, 10, 12]
    assert plan(run, 5, 12).compared == [5, 6, 10, 12]  # the 9 of the run is the mean over 8 and 9 only
    report = again(run, 6, 7)
    assert report.equal and report.curve.points == 2  # both end at 7


def test_an_interrupted_replay_leaves_nothing(original: RunFolder, scratch: Path) -> None:
    def interrupt(_: dict[str, Any]) -> None:
        assert len(list(scratch.iterdir())) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(plan(original, 15, 20), original.path, interrupt)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("text", ["5", "a:b", "5:5", "7:3", "1:2:3", "-1:4", ""])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected A:B"):
        slice_of(text)


def test_steps_that_the_run_does_not_have(original: RunFolder) -> None:
    assert slice_of("10:200") == (10, 200)
    with pytest.raises(ValueError, match="expected an end of at most 20"):
        plan(original, 15, 21)
    with pytest.raises(ValueError, match="take in one of the steps 3, 5, 6, 9"):
        plan(original, 7, 8)


def test_a_run_is_found_by_folder_or_by_id(run: RunFolder, tmp_path: Path) -> None:
    assert find(str(run.path), tmp_path / "home").path == run.path
    (tmp_path / "home" / "runs").mkdir(parents=True)
    run.path.rename(tmp_path / "home" / "runs" / "job-1")
    assert find("job-1", tmp_path / "home").path == tmp_path / "home" / "runs" / "job-1"
    with pytest.raises(ValueError, match="got job 'job-2', expected a run folder or the id of a job"):
        find("job-2", tmp_path / "home")


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 8), st.integers(1, 60), st.integers(0, 60))
def test_a_replay_from_a_checkpoint_has_the_points_of_the_run(
    log_steps: int, every: int, checkpoints: int, steps: int, total: int
) -> None:
    document = {"name": "t", "method": {"name": "mae"}, "model": {"name": "vit"}, "data": {"train": {"shards": "x"}}}
    document |= {"steps": 1, "log_steps": log_steps, "checkpoint": {"every_steps": every}}
    spec = JobSpec.model_validate(document)
    start = checkpoints * every
    last = start + steps
    whole = own_points(spec, 0, last + total)
    own = own_points(spec, start, last)
    assert list(own) == sorted(own) and list(own.values()) == [start, *list(own)[:-1]]
    assert {s: whole[s] for s in whole if start < s < last} == {s: own[s] for s in own if s < last}


def test_what_is_no_number_differs_by_all_of_it_and_stays_json() -> None:
    run = {1: {"loss": None, "lr": 0.0}, 2: {"loss": 1.0, "lr": 0.0}}
    curves = compare_curves(run, {1: {"loss": None, "lr": 0.0}, 2: {"loss": None, "lr": 0.0}})
    assert curves.first_difference == {"step": 2, "name": "loss", "run": 1.0, "replay": None}
    assert json.loads(json.dumps(asdict(curves), allow_nan=False))["largest"] == {"loss": 1, "grad_norm": 0, "lr": 0}


def test_weights_of_another_shape_are_named() -> None:
    a = {"w": torch.ones(2), "n": torch.tensor(3)}
    assert compare_weights(a, {"w": torch.ones(2), "n": torch.tensor(5)}) == Weights("n", 2.0)
    assert compare_weights(a, {"w": torch.ones(3), "n": torch.tensor(3)}) == Weights("w", None)
    assert compare_weights(a, {"w": torch.ones(2)}) == Weights("n", None)
