"""Runs with a mirror: each finds its own copy there, from any disk, and nobody else's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from workloads.checkpoint import latest_step
from workloads.checkpoint_mirror import Mirror
from workloads.record import RunFolder
from workloads.run import FAILED, STOPPED, SUCCEEDED, execute, run_local
from workloads.spec import JobSpec
from workloads.train import train

ToyJob = Callable[..., JobSpec]


@pytest.fixture
def policy(tmp_path: Path) -> dict[str, str]:
    return {"mirror": str(tmp_path / "mirror")}


def steps(run: RunFolder) -> list[int]:
    return [point["step"] for point in run.read_metrics()]


def test_on_another_disk_the_log_goes_on(
    toy_job: ToyJob, policy: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spec = toy_job(checkpoint=policy)
    runs = [RunFolder(tmp_path / disk / "job-1") for disk in ("lost", "new")]

    def stop(point: dict[str, object]) -> None:
        runs[0].stop.touch()

    log = tmp_path / "mirror" / "job-1" / "log.txt"
    assert execute(spec, runs[0], tmp_path, job_id="job-1", on_point=stop) == STOPPED
    first = runs[0].log.read_bytes()
    assert log.read_bytes() == first and first
    assert execute(spec, runs[1], tmp_path, job_id="job-1", attempt=2) == SUCCEEDED
    both = log.read_bytes()
    assert both.startswith(first) and b"succeeded; the artifact is" in both[len(first) :]
    assert steps(runs[0])[-1] < steps(runs[1])[0]


def test_a_clone_with_the_mirror_of_the_original_trains_from_the_start(
    toy_job: ToyJob, policy: dict[str, str], tmp_path: Path
) -> None:
    original, clone = (RunFolder(tmp_path / name) for name in ("job-1", "job-2"))
    assert execute(toy_job(checkpoint=policy), original, tmp_path, job_id="job-1") == SUCCEEDED
    before = {path: path.read_bytes() for path in (tmp_path / "mirror" / "job-1").iterdir()}
    other = toy_job(checkpoint=policy, optimizer={"lr": 0.1})
    assert execute(other, clone, tmp_path, job_id="job-2") == SUCCEEDED
    assert steps(clone) == steps(original) and len(steps(clone)) == 2
    weights = [(run.artifact / "model.safetensors").read_bytes() for run in (original, clone)]
    assert weights[0] != weights[1]
    assert {path: path.read_bytes() for path in (tmp_path / "mirror" / "job-1").iterdir()} == before


def test_a_mirror_by_this_name_of_another_job_is_not_continued_from_and_fresh_empties_it(
    toy_job: ToyJob, policy: dict[str, str], tmp_path: Path
) -> None:
    """Two people may call their folders alike."""
    theirs, ours = (RunFolder(tmp_path / who / "try") for who in ("ann", "bob"))
    assert run_local(toy_job(checkpoint=policy), theirs.path) == SUCCEEDED
    spec = toy_job(checkpoint=policy, seed=1)
    assert run_local(spec, ours.path) == FAILED and not ours.checkpoints.exists()
    assert "it differs in seed" in ours.log.read_text()
    assert run_local(spec, ours.path, fresh=True) == SUCCEEDED
    assert steps(ours) == steps(theirs)
    (tmp_path / "cat").mkdir()
    assert run_local(spec, tmp_path / "cat" / "try") == SUCCEEDED  # the same job, on a disk that has nothing of it
    assert latest_step(tmp_path / "cat" / "try" / "checkpoints") == 20 and not steps(
        RunFolder(tmp_path / "cat" / "try")
    )


def test_a_mirror_that_is_away_and_a_checkpoint_that_is_damaged_are_two_kinds_of_event(
    toy_job: ToyJob, policy: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, polls = RunFolder(tmp_path / "run"), iter(range(20))
    spec = toy_job(checkpoint=policy | {"every_steps": 5})
    assert not train(spec, run, tmp_path, should_stop=lambda: next(polls) == 12)

    def away(self: Mirror) -> list[int]:
        raise OSError("no route to host")

    monkeypatch.setattr(Mirror, "steps", away)
    newest = run.checkpoints / "step-00000013.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert train(spec, run, tmp_path)
    told = {event["kind"]: event["message"] for event in run.read_events()}
    assert list(told) == ["mirror_away", "checkpoint_passed_over"]
    assert "no route to host" in told["mirror_away"] and "step 13 is damaged" in told["checkpoint_passed_over"]
    assert run.warnings.read_text().splitlines()[:2] == list(told.values())


def test_fresh_that_cannot_empty_the_mirror_removes_nothing(toy_job: ToyJob, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "try")
    run.path.mkdir()
    run.spec.write_text("{}")
    with pytest.raises(ValueError, match="nowhere://x/try cannot be emptied"):
        run_local(toy_job(checkpoint={"mirror": "nowhere://x"}), run.path, fresh=True)
    assert run.spec.exists()


@pytest.mark.parametrize("out", ["try", "try/../try", "try/within/.."])
def test_a_mirror_that_would_be_the_run_folder_is_refused(toy_job: ToyJob, tmp_path: Path, out: str) -> None:
    with pytest.raises(ValueError, match=f"is {tmp_path / 'try'} itself"):
        run_local(toy_job(checkpoint={"mirror": str(tmp_path)}), tmp_path / out)
    assert list(tmp_path.iterdir()) == []
