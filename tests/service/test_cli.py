"""The command line: exit codes, JSON, wrong input; without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from service import cli
from service.client import ApiError
from workloads.record import RunFolder
from workloads.spec import JobSpec

runner = CliRunner()
cli._more_commands()

JOB = {
    "id": "job-1",
    "name": "toy",
    "state": "SUCCEEDED",
    "after": [],
    "reason": None,
    "hint": None,
    "priority": "normal",
    "queue": None,
    "method": "mae",
    "search": None,
    "deploy": None,
    "found": None,
    "attempt": 1,
    "created_at": "2026-11-21T00:00:00+00:00",
    "finished_at": None,
    "progress": {"step": 3, "total_steps": 3, "epoch": 0},
    "skipped": [],
    "models": ["toy@1"],
    "evaluations": [],
    "spec": {"evaluate": []},
}


class FakeClient:
    """Answers without a service."""

    state = "SUCCEEDED"
    refuse: ApiError | None = None
    submitted: dict[str, Any] | None = None

    def __init__(self, url: str, **_: Any) -> None:
        pass

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, spec: dict[str, Any]) -> dict[str, Any]:
        if FakeClient.refuse is not None:
            raise FakeClient.refuse
        FakeClient.submitted = spec
        return JOB | {"state": "QUEUED"}

    def submit_all(self, specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        reasons = [None] + ["waits for job-1"] * (len(specs) - 1)
        return [JOB | {"state": "QUEUED", "reason": r, "spec": s} for r, s in zip(reasons, specs, strict=True)]

    def dry_run(self, spec: dict[str, Any], gpu: str | None) -> dict[str, Any]:
        return {"name": spec["name"], "gpu": gpu}

    def metrics(self, job_id: str, after_step: int = -1) -> list[dict[str, Any]]:
        points = [{"step": 3, "epoch": 0, "loss": 0.5, "lr": 1e-3, "samples_per_s": 10.0}]
        return [point for point in points if point["step"] > after_step]

    def evaluations(self, job_id: str) -> dict[str, Any]:
        online = [{"step": s, "entry": e, "label": "knn", "mean": 0.1 * s + e} for s in (2, 3) for e in (0, 2)]
        return {"evaluations": [], "online": [*online, {"step": 3, "entry": 1, "label": "probe", "mean": 0.25}]}

    def report(self, job_id: str) -> str:
        return f"<html>of {job_id}"

    def wait(self, job_id: str, on_update: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        job = JOB | {"state": FakeClient.state, "reason": "because"}
        on_update(job)
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        return JOB | {"state": FakeClient.state, "reason": "because"}

    def pause(self, job_id: str) -> dict[str, Any]:
        return JOB | {"state": "PAUSING"}

    def resume(self, job_id: str, max_duration: str | None) -> dict[str, Any]:
        return JOB | {"state": "QUEUED", "reason": max_duration}

    def retry(self, job_id: str) -> dict[str, Any]:
        return JOB | {"state": "QUEUED"}

    def clone(self, job_id: str, patch: dict[str, Any]) -> dict[str, Any]:
        return JOB | {"id": "job-2", "state": "QUEUED", "spec": patch}

    def diff(self, job_id: str, other_id: str) -> dict[str, Any]:
        return {"spec": [{"path": "steps", "a": 3}, {"path": "name", "a": "x", "b": "y"}], "provenance": []}

    def events(self, job_id: str) -> list[dict[str, Any]]:
        kinds = ("queued", "starting", "running", "workers_left", "workers_joined", "succeeded")
        return [{"time": "2026-11-21T00:00:00.1+00:00", "kind": kind, "message": "why"} for kind in kinds]

    def follow_events(self, job_id: str) -> Iterator[dict[str, Any]]:
        return iter(self.events(job_id))

    def follow_logs(self, job_id: str, **wanted: Any) -> Iterator[str]:
        return iter([f"a line of {wanted}"])

    def jobs(self, limit: int) -> list[dict[str, Any]]:
        return [JOB]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setenv("MANTA_URL", "http://manta")
    monkeypatch.setattr("service.client.Client", FakeClient)
    FakeClient.state, FakeClient.refuse, FakeClient.submitted = "SUCCEEDED", None, None
    return FakeClient


@pytest.fixture
def spec_file(tmp_path: Path, toy_job: Callable[..., JobSpec]) -> Path:
    document = toy_job().model_dump(mode="json") | {"data": {"train": {"shards": "train-0.tar"}}}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_submit_sends_absolute_shards(service: type[FakeClient], spec_file: Path) -> None:
    result = runner.invoke(cli.app, ["submit", str(spec_file)])
    assert (result.exit_code, result.stdout.strip()) == (0, "job-1 QUEUED")
    assert service.submitted is not None
    assert service.submitted["data"]["train"]["shards"] == str(spec_file.parent / "train-0.tar")


def test_a_dry_run_submits_nothing(service: type[FakeClient], spec_file: Path) -> None:
    command = ["submit", str(spec_file), "--dry-run", "--json"]
    assert json.loads(runner.invoke(cli.app, [*command, "--gpu", "A100"]).stdout) == {"name": "toy", "gpu": "A100"}
    assert service.submitted is None
    for wrong in ([*command, "--follow"], ["submit", str(spec_file), "--gpu", "A100"]):
        assert runner.invoke(cli.app, wrong).exit_code == 2


@pytest.mark.parametrize(("state", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELLED", 3)])
def test_follow_exits_by_the_state(service: type[FakeClient], spec_file: Path, state: str, code: int) -> None:
    service.state = state
    result = runner.invoke(cli.app, ["submit", str(spec_file), "--follow"])
    assert result.exit_code == code
    assert "loss 0.5000" in result.stdout and f"state\t{state}" in result.stdout


@pytest.mark.parametrize(("status", "code"), [(422, 1), (503, 4), (0, 4)])
def test_refusals_have_their_codes(service: type[FakeClient], spec_file: Path, status: int, code: int) -> None:
    service.refuse = ApiError(status, "No", "not like this", "like that")
    result = runner.invoke(cli.app, ["submit", str(spec_file)])
    assert result.exit_code == code and "not like this" in result.stderr and "like that" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "is not YAML"), ("epohcs: 3", "did you mean 'epochs'"), ("3", "mapping")]
)
def test_a_file_that_is_no_job_is_wrong_usage(service: type[FakeClient], tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    result = runner.invoke(cli.app, ["submit", str(path)])
    assert result.exit_code == 2 and words in result.stderr


def test_lists_are_tables_in_a_pipe_and_json_on_request(service: type[FakeClient]) -> None:
    lines = runner.invoke(cli.app, ["jobs"]).stdout.splitlines()
    assert lines[0].split("\t")[:2] == ["id", "name"] and lines[1].split("\t")[:2] == ["job-1", "toy"]
    assert json.loads(runner.invoke(cli.app, ["jobs", "--json"]).stdout)[0]["id"] == "job-1"
    assert json.loads(runner.invoke(cli.app, ["metrics", "job-1", "--json"]).stdout)[0]["loss"] == 0.5


def test_evaluations_of_checkpoints_are_part_of_the_curve(service: type[FakeClient]) -> None:
    point = json.loads(runner.invoke(cli.app, ["metrics", "job-1", "--json"]).stdout)[0]
    assert (point["loss"], point["knn[0]"], point["knn[2]"], point["probe"]) == (0.5, pytest.approx(0.3), 2.3, 0.25)
    header, row = runner.invoke(cli.app, ["metrics", "job-1"]).stdout.splitlines()
    assert dict(zip(header.split("\t"), row.split("\t"), strict=True))["probe"] == "0.25"
    shown = runner.invoke(cli.app, ["job", "job-1"]).stdout
    assert "knn\t0.300 at step 3\nprobe\t0.250 at step 3\nknn\t2.300 at step 3" in shown  # the newest of each


def test_a_report_is_a_file(service: type[FakeClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runner.invoke(cli.app, ["report", "job-1"]).stdout == "job-1.html\n"
    assert runner.invoke(cli.app, ["report", "job-1", "--out", "page.html"]).stdout == "page.html\n"
    assert [Path(name).read_text() for name in ("job-1.html", "page.html")] == ["<html>of job-1"] * 2
    refused = runner.invoke(cli.app, ["report", "job-1", "-o", "absent/page.html"])
    assert refused.exit_code == 1 and "name a file in a folder that is there" in " ".join(refused.output.split())


def test_pause_resume_and_events(service: type[FakeClient]) -> None:
    assert runner.invoke(cli.app, ["pause", "job-1"]).stdout == "job-1 PAUSING\n"
    assert runner.invoke(cli.app, ["resume", "job-1"]).stdout == "job-1 QUEUED\n"
    longer = runner.invoke(cli.app, ["resume", "job-1", "--max-duration", "2h", "--json"]).stdout
    assert json.loads(longer)["reason"] == "2h"
    told = runner.invoke(cli.app, ["events", "job-1"]).stdout.splitlines()
    assert len(told) == 7 and told[1].split("\t") == ["2026-11-21T00:00:00", "queued", "why"]
    assert len(json.loads(runner.invoke(cli.app, ["events", "job-1", "--json"]).stdout)) == 6
    shown = runner.invoke(cli.app, ["job", "job-1"]).stdout
    assert "state\tSUCCEEDED" in shown and "workers_left" in shown and "queued\twhy" not in shown  # the last five


@pytest.mark.parametrize(
    "command", [["logs", "job-1", "--rank", "3"], ["events", "job-1"], ["events", "job-1", "--json"]]
)
def test_who_follows_a_job_that_is_paused_is_told_how_it_goes_on(service: type[FakeClient], command: list[str]) -> None:
    ended = runner.invoke(cli.app, [*command, "-f"])
    assert ended.exit_code == 0 and ended.stderr == "" and len(ended.stdout.splitlines()) in (1, 6)
    FakeClient.state = "PAUSED"
    paused = runner.invoke(cli.app, [*command, "-f"])
    assert paused.stdout == ended.stdout and paused.exit_code == 0
    assert paused.stderr == "job-1 is paused (because): `manta resume job-1`, then follow it again\n"


def test_several_files_are_one_list(service: type[FakeClient], spec_file: Path) -> None:
    second = spec_file.with_name("second.yaml")
    second.write_text(yaml.safe_dump(yaml.safe_load(spec_file.read_text()) | {"after": ["$toy"], "init": "job:$toy"}))
    command = ["submit", str(spec_file), str(second)]
    assert runner.invoke(cli.app, command).stdout == "job-1 QUEUED\njob-1 QUEUED waits for job-1\n"
    sent = json.loads(runner.invoke(cli.app, [*command, "--json"]).stdout)[1]["spec"]
    assert (sent["after"], sent["init"]) == (["$toy"], "job:$toy")
    assert runner.invoke(cli.app, [*command, "--follow"]).exit_code == 2


def test_retry_clone_and_diff(service: type[FakeClient]) -> None:
    assert runner.invoke(cli.app, ["retry", "job-1"]).stdout == "job-1 QUEUED\n"
    changed = runner.invoke(cli.app, ["clone", "job-1", "--set", "optimizer.lr=0.1", "--set", "steps=null", "--json"])
    assert json.loads(changed.stdout)["spec"] == {"optimizer": {"lr": 0.1}, "steps": None}
    assert runner.invoke(cli.app, ["clone", "job-1", "--set", "steps"]).exit_code == 2
    lines = runner.invoke(cli.app, ["diff", "job-1", "job-2"]).stdout.splitlines()
    assert lines == ["of\twhere\tjob-1\tjob-2", "spec\tsteps\t3\t", 'spec\tname\t"x"\t"y"']


@pytest.mark.parametrize("command", [["jobs"], ["env"], ["submit"], ["logs", "x"]])
def test_without_a_cluster_every_command_says_so_at_once(
    tmp_path: Path, spec_file: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MANTA_URL", raising=False)
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    result = runner.invoke(cli.app, command + ([str(spec_file)] if command == ["submit"] else []))
    assert result.exit_code == 4 and "start it by `manta up`" in result.stderr


def test_run_local_trains_and_refuses_another_job(tmp_path: Path, toy_job: Callable[..., JobSpec]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(toy_job().model_dump(mode="json")))
    command = ["run", "--local", str(path), "--out", str(tmp_path / "out")]
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 0 and "step 20/20" in result.stdout
    assert (tmp_path / "out" / "artifact" / "model.safetensors").is_file()
    assert runner.invoke(cli.app, ["run", str(path), "--out", str(tmp_path / "out")]).exit_code == 2
    path.write_text(yaml.safe_dump(toy_job(seed=4).model_dump(mode="json")))
    run = RunFolder(tmp_path / "out")
    record = run.read_record()
    assert record is not None
    run.write_record(record.model_copy(update={"state": "STOPPED", "reason": "of before"}))
    refused = runner.invoke(cli.app, command)
    assert refused.exit_code == 1 and "of before" not in refused.stderr  # which has nothing to do with it


def test_stopped_it_says_how_to_go_on(
    tmp_path: Path, toy_job: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "job.yaml", RunFolder(tmp_path / "out")
    path.write_text(yaml.safe_dump(toy_job().model_dump(mode="json")))
    monkeypatch.setattr("workloads.work.Work.go", lambda *_: run.stop.touch())
    result = runner.invoke(cli.app, ["run", "--local", str(path), "--out", str(run.path)])
    assert result.exit_code == 3
    assert "STOPPED: stopped on request; what is done is kept (the same command goes on from there)" in result.stderr


def test_replay_says_whether_steps_are_equal(
    tmp_path: Path, toy_job: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    path, run = tmp_path / "job.yaml", tmp_path / "runs" / "job-1"
    path.write_text(yaml.safe_dump(toy_job().model_dump(mode="json")))
    assert runner.invoke(cli.app, ["run", "--local", str(path), "--out", str(run)]).exit_code == 0
    command = ["run", "--replay", "job-1", "--steps", "15:20"]
    equal = runner.invoke(cli.app, [*command, "--json"])
    report = json.loads(equal.stdout)
    assert equal.exit_code == 0 and report["equal"] and report["curve"]["points"] == 1
    assert report["weights"] == {"tensor": None, "difference": 0.0}
    assert "trains 5 steps from the checkpoint of step 15" in equal.stderr

    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points[-1]["loss"] += 0.1
    (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    other = runner.invoke(cli.app, command)
    assert other.exit_code == 1 and "result\tNOT equal" in other.stdout
    assert "differs first at step 20: loss was" in other.stdout

    provenance = run / "provenance.json"
    provenance.write_text(provenance.read_text().replace('"content_hash": "', '"content_hash": "f'))
    refused = runner.invoke(cli.app, command)
    assert refused.exit_code == 1 and "other data" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replay", "nobody"], "--steps A:B"),
        (["--replay", "nobody", "--steps", "1:2"], "expected a run folder or the id of a job"),
        (["--replay", "nobody", "--steps", "1:2", "--out", "there"], "no job, --out or --fresh"),
        (["--steps", "1:2"], "--replay JOB"),
        (["--json", "--local"], "--replay JOB"),
        (["--local"], "got no job or no --out"),
    ],
)
def test_replay_refuses_what_it_cannot_mean(
    tmp_path: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    result = runner.invoke(cli.app, ["run", *arguments])
    assert result.exit_code == 2 and words in result.stderr


def test_help_is_quick_and_imports_neither_ray_nor_torch() -> None:
    script = "import sys; sys.argv = ['manta', '--help']\nfrom service.cli import main\n"
    script += "try: main()\nexcept SystemExit: pass\n"
    script += "print([name for name in ('ray', 'torch', 'fastapi') if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "submit" in done.stdout
