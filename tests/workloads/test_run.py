"""A run from its command line: killed, stopped, resumed, refused, and what it leaves."""

from __future__ import annotations

import fcntl
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.toy import TOY_MAE, TOY_MODEL, write_shards
from workloads import checkpoint
from workloads.journal import Journal
from workloads.record import Record, RunFolder
from workloads.run import FAILED, STOPPED, SUCCEEDED, _job_id, execute, run_local
from workloads.spec import JobSpec

SCRIPT = """
import os, signal, sys
from pathlib import Path
from workloads.checkpoint import latest_step
from workloads.run import run_local
from workloads.spec import JobSpec
from workloads.step import Stepper
kill_at = int(sys.argv[3])
def step(self, streams, progress, _step=Stepper.__call__):
    print(progress.step, flush=True)
    if progress.step == kill_at:
        while (latest_step(Path(sys.argv[2]) / "checkpoints") or 0) < kill_at // 5 * 5:
            pass  # it is being written
        os.kill(os.getpid(), signal.SIGKILL)
    return _step(self, streams, progress)
Stepper.__call__ = step
sys.exit(run_local(JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
"""


def final_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    step = checkpoint.latest_step(run.checkpoints)
    return torch.load(run.checkpoints / f"step-{step:08d}.pt", weights_only=True)["method"]


def test_killed_at_any_step_and_resumed_ends_with_the_same_weights(
    toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    spec = toy_job()  # 20 steps, a checkpoint every 5
    assert run_local(spec, tmp_path / "whole") == SUCCEEDED
    (tmp_path / "job.json").write_text(spec.model_dump_json())
    steps = torch.randperm(19, generator=torch.Generator().manual_seed(time.time_ns()))[
        :3
    ].tolist()  # three random ones
    run, sealed = RunFolder(tmp_path / "killed"), 0
    for kill_at in sorted(steps):
        arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "job.json"), str(run.path), str(kill_at)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, steps
        assert list(map(int, done.stdout.split())) == list(range(sealed, kill_at + 1)), steps
        sealed = kill_at // 5 * 5
        assert (checkpoint.latest_step(run.checkpoints) or 0) == sealed, steps
        record = run.read_record()
        assert record is not None and record.state in ("STARTING", "RUNNING")  # nobody was left to say otherwise
    assert run_local(spec, run.path) == SUCCEEDED
    expected, got = final_weights(RunFolder(tmp_path / "whole")), final_weights(run)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == [], steps
    curves = [[(p["step"], p["loss"]) for p in r.read_metrics()] for r in (RunFolder(tmp_path / "whole"), run)]
    assert curves[0] == curves[1], steps
    record = run.read_record()
    assert record is not None and (record.state, record.attempt, record.step) == ("SUCCEEDED", 4, 20)


def test_a_second_call_does_nothing_and_fresh_starts_anew(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out")
    assert run_local(toy_job(), run.path) == SUCCEEDED
    written = (run.artifact / "model.safetensors").stat().st_mtime_ns
    assert run_local(toy_job(), run.path) == SUCCEEDED
    assert (run.artifact / "model.safetensors").stat().st_mtime_ns == written
    assert run_local(toy_job(seed=1), run.path) == FAILED  # another job may not take the folder over
    assert "differs in seed" in run.log.read_text()
    assert run_local(toy_job(seed=1), run.path, fresh=True) == SUCCEEDED
    assert (run.artifact / "model.safetensors").stat().st_mtime_ns != written


def test_fresh_does_not_delete_what_is_no_run(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds files but no run"):
        run_local(toy_job(), tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_stop_file_checkpoints_and_the_next_call_continues(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def stop(point: dict[str, object]) -> None:
        if point["step"] == 10:
            run.stop.touch()

    spec = toy_job()
    assert execute(spec, run, tmp_path, job_id="j", on_point=stop) == STOPPED
    record = run.read_record()
    assert record is not None and (record.state, record.step) == ("STOPPED", 11)  # the step after it was asked for
    assert checkpoint.latest_step(run.checkpoints) == 11
    run.stop.unlink()
    assert execute(spec, run, tmp_path, job_id="j", attempt=2) == SUCCEEDED


class Hours:
    """A clock of the journal that jumps by an hour at one point of the curve, whose answer the run then waits for."""

    def __init__(self, run: RunFolder, at_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.at_step, self.now = run, at_step, 0.0
        monkeypatch.setattr("workloads.journal.HEARTBEAT_S", 0.05)
        monkeypatch.setattr("workloads.run.Journal", functools.partial(Journal, clock=lambda: self.now))

    def on_point(self, point: dict[str, object]) -> None:
        if point["step"] == self.at_step:
            self.wait_for(lambda: '"RUNNING"' in self.run.record.read_text())
            self.now += 3600
            self.wait_for(self.run.stop.exists)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_max_duration_keeps_the_checkpoint_and_a_longer_one_continues(
    toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    hours = Hours(run, 10, monkeypatch)
    assert run_local(toy_job(max_duration="30m"), run.path, on_point=hours.on_point) == FAILED
    record = run.read_record()
    assert record is not None and (record.state, record.ran_s) == ("FAILED", 3600)
    reached = f"reached step {record.step} of 20; the last checkpoint is kept"
    assert 10 <= record.step < 20 and record.reason == f"got max_duration of 1800 s, {reached}"
    assert record.hint is not None and "longer max_duration" in record.hint
    assert checkpoint.latest_step(run.checkpoints) == record.step
    assert not run.artifact.exists() and not run.stop.exists()
    assert run_local(toy_job(max_duration="2h"), run.path) == SUCCEEDED
    last = run.read_record()
    assert last is not None and (last.step, last.ran_s) == (20, 3600)


def test_a_limit_that_passes_with_the_last_step_does_not_spoil_the_run(
    toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    hours = Hours(run, 20, monkeypatch)
    assert run_local(toy_job(max_duration="30m"), run.path, on_point=hours.on_point) == SUCCEEDED
    assert run.artifact.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints(toy_job: Callable[..., JobSpec], tmp_path: Path, number: signal.Signals) -> None:
    run = RunFolder(tmp_path)

    def interrupt(point: dict[str, object]) -> None:
        if point["step"] == 10:
            os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert execute(toy_job(), run, tmp_path, job_id="j", on_point=interrupt) == STOPPED
    assert checkpoint.latest_step(run.checkpoints) == 11
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_two_processes_never_run_one_job(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    with open(tmp_path / "lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert execute(toy_job(), RunFolder(tmp_path), tmp_path, job_id="j") == FAILED
        assert not (tmp_path / "record.json").exists()  # the record is the other one's


def test_a_non_finite_loss_stops_with_its_step_and_keeps_the_checkpoint(
    toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    spec = toy_job(optimizer={"lr": 1e30}, schedule={"warmup_epochs": 0}, checkpoint={"every_steps": 1})
    assert execute(spec, run, tmp_path, job_id="j") == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None and record.hint is not None
    assert "was not finite in 10 steps in a row" in record.reason and "lower optimizer.lr" in record.hint
    kept = checkpoint.latest_step(run.checkpoints)
    assert kept is not None and f"step {kept + 1}" in record.reason
    assert all(point["loss"] is None or point["loss"] < float("inf") for point in run.read_metrics())


def test_a_full_disk_fails_the_job_and_keeps_the_checkpoint_before(
    toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    save = torch.save

    def full(state: dict[str, int], file: object) -> None:
        if state["step"] == 10:
            raise OSError(28, "No space left on device")
        save(state, file)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "save", full)
    assert execute(toy_job(), run, tmp_path, job_id="j") == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None
    assert "step 10 could not be written" in record.reason and "No space left" in record.reason
    assert record.hint is not None and "free disk space" in record.hint
    monkeypatch.undo()
    assert checkpoint.latest_step(run.checkpoints) == 5
    assert execute(toy_job(), run, tmp_path, job_id="j", attempt=2) == SUCCEEDED


def corrupt(pattern: str, folder: Path, members: int) -> str:
    """Copies the shards and overwrites the pixels of the first images."""
    source = Path(pattern).parent
    for path in sorted(source.glob("train-*.tar")):
        shutil.copy(path, folder)
    shutil.copy(source / "classes.txt", folder)
    shard = folder / "train-000000.tar"
    with tarfile.open(shard) as tar:
        images = [m for m in tar.getmembers() if m.name.endswith(".png")][:members]
    data = bytearray(shard.read_bytes())
    for member in images:
        data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    shard.write_bytes(data)
    return str(folder / Path(pattern).name)


def test_one_corrupt_image_is_skipped_and_reported(
    toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    pattern = corrupt(toy_shards["train"], tmp_path / "data", 1)
    run = RunFolder(tmp_path / "run")
    spec = toy_job(data={"train": {"shards": pattern, "max_bad_share": 0.02}})
    assert execute(spec, run, tmp_path, job_id="j") == SUCCEEDED
    record = run.read_record()
    assert record is not None and len(record.skipped) == 1
    assert "train-000000.tar" in record.skipped[0] and "train00000" in record.skipped[0]


def test_more_corrupt_images_than_the_share_fail_the_job(
    toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    pattern = corrupt(toy_shards["train"], tmp_path / "data", 3)
    run = RunFolder(tmp_path / "run")
    assert (
        execute(toy_job(data={"train": {"shards": pattern, "max_bad_share": 0.02}}), run, tmp_path, job_id="j")
        == FAILED
    )
    record = run.read_record()
    assert record is not None and record.reason is not None
    assert "train-000000.tar" in record.reason and "offset" in record.reason


def test_a_bad_spec_is_refused_before_anything_is_trained(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert execute(toy_job(method={"name": "mea"}), run, tmp_path, job_id="j") == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None and "did you mean 'mae'" in record.reason
    assert not run.checkpoints.exists()


def test_evaluations_are_stored_with_the_artifact_and_resumed(
    toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    data = {"train": {"shards": toy_shards["train"]}, "test": {"shards": toy_shards["test"]}}
    few = {"name": "fine_tune", "labels_per_class": 2, "epochs": 2, "batch_size": 4, "seeds": [0, 1], "register": "few"}
    spec = toy_job(evaluate=[{"name": "knn", "labels_per_class": 5, "data": data}, few | {"data": data}])
    run = RunFolder(tmp_path)
    assert execute(spec, run, tmp_path, job_id="j") == SUCCEEDED
    knn, tuned = run.read_evaluations()
    assert knn["label"] == "knn5" and set(knn["results"]) == {"pretrained", "untrained", "raw_pixels"}
    assert len(knn["results"]["pretrained"]["seeds"]) == 3
    assert tuned["label"] == "few_label2" and tuned["register"] == "few"
    assert (run.path / tuned["artifact"] / "model.safetensors").is_file()
    card = json.loads((run.artifact / "manta.json").read_text())
    assert [result["label"] for result in card["evaluations"]] == ["knn5", "few_label2"]
    run.evaluations.write_text(json.dumps([knn]))  # as if it had been killed in the second
    assert execute(spec, run, tmp_path, job_id="j", attempt=2) == SUCCEEDED
    assert run.read_evaluations()[1]["results"] == tuned["results"]


def test_relative_shards_are_taken_from_the_file(tmp_path: Path) -> None:
    spec = JobSpec.model_validate(
        {
            "name": "x",
            "method": TOY_MAE,
            "model": TOY_MODEL,
            "epochs": 1,
            "data": {"train": {"shards": ["a.tar", "/abs/b.tar", "s3://bucket/c.tar"]}},
            "evaluate": [{"name": "knn", "data": {"train": {"shards": "t.tar"}, "test": {"shards": "u.tar"}}}],
        }
    )
    fixed = spec.absolute(tmp_path)
    assert fixed.data["train"].shards == [str(tmp_path / "a.tar"), "/abs/b.tar", "s3://bucket/c.tar"]
    assert fixed.evaluate[0].config["data"]["test"]["shards"] == str(tmp_path / "u.tar")


def test_the_job_id_is_the_services_or_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANTA_JOB_ID", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    with pytest.raises(SystemExit, match="manta run --local"):
        _job_id()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert _job_id() == "raysubmit_1"
    monkeypatch.setenv("MANTA_JOB_ID", "job-2")
    assert _job_id() == "job-2"


def test_shards_of_images_only_train_without_labels(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    """The reader gives label -1; MAE does not ask."""
    write_shards(tmp_path, "train", 16, 1)
    with tarfile.open(tmp_path / "train-000000.tar") as source, tarfile.open(tmp_path / "bare-000000.tar", "w") as bare:
        for member in source.getmembers():
            if member.name.endswith(".png"):
                extracted = source.extractfile(member)
                assert extracted is not None
                bare.addfile(member, io.BytesIO(extracted.read()))
    spec = toy_job(data={"train": {"shards": str(tmp_path / "bare-000000.tar")}})
    assert run_local(spec, tmp_path / "run") == SUCCEEDED


def test_an_attempt_after_one_that_succeeded_unseen_changes_nothing(
    toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_record(Record(job_id="j", state="SUCCEEDED", step=7, started_at=1.0, updated_at=1.0))
    before = run.record.read_bytes()
    assert execute(toy_job(), run, tmp_path, job_id="j", attempt=2, ray=True) == SUCCEEDED
    assert run.record.read_bytes() == before and not run.checkpoints.exists()
