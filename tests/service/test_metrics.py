"""What Prometheus is told: right by the table, the runs and the requests, in a form that its tools take."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from service.observe.rounds import Rounds
from service.observe.run_metrics import MOST, RunMetrics
from service.store import Job
from tests.service.fakes import write_record
from tests.service.secured import Secured
from workloads.checkpoint_folder import MIRRORED, FileSum, Seal, complete
from workloads.record import RunFolder

SPEC = {"method": {"name": "mae"}, "checkpoint": {"mirror": "s3://bucket/copies"}}
OTHER_UNITS = re.compile(r"_(ms|milliseconds|minutes|hours|kib|mib|gib|mb|gb|percent|share)(_|$)")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    yield service
    service.close()


def add(service: Secured, job_id: str, state: str, *, project: str = "default", **more: object) -> None:
    with service.store.session() as session:
        job = Job(id=job_id, name="toy", spec=SPEC, origin="rest", project=project, created_at=100.0, **more)
        job.become("QUEUED", "accepted")
        if state != "QUEUED":
            job.become(state, "")  # type: ignore[arg-type]
        session.add(job)


def scrape(service: Secured, token: str | None = None) -> str:
    answer = service.client(token).get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return answer.text


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(text: str, name: str, /, **labels: str) -> float | None:
    """Of the one sample with these labels among its own; None where there is none."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) <= 1, (name, labels, found)
    return found[0] if found else None


def a_run(service: Secured, job_id: str) -> RunFolder:
    run = RunFolder(service.settings.runs / job_id)
    write_record(run.path, "RUNNING", step=70, total_steps=200, skipped_samples=1500, ran_s=12.5, warnings=["slow"])
    run.metrics.write_text(
        '{"step": 60, "loss": 3.0}\n{"step": 70, "epoch": 1, "loss": 2.5, "samples_per_s": 640.0, "step_time_s": 0.1,'
        ' "data_wait_share": 0.25, "memory_gib": 2.0}\n{"step": 80, "lo'
    )
    run.checkpoints.mkdir()
    for step in (25, 50):
        files = {f"step-{step:08d}.pt": FileSum(bytes=1000, sha256="0")}
        complete(run.checkpoints, Seal(step=step, files=files, metric=None, time=500.0 + step, seconds=0.5))
    return run


def test_jobs_and_queue_are_counted_by_project(service: Secured) -> None:
    service.project("vision")
    add(service, "a", "QUEUED", cpus=4, resumed_at=130.0)
    add(service, "b", "QUEUED", cpus=2, gpus=1)
    add(service, "c", "QUEUED", held=True)
    add(service, "d", "RUNNING", attempt=3, cpus=8)
    text = scrape(service)
    assert value(text, "manta_jobs", project="default", state="QUEUED") == 3
    assert value(text, "manta_jobs", project="default", state="RUNNING") == 1
    assert value(text, "manta_jobs", project="vision", state="RUNNING") == 0
    assert value(text, "manta_queue_jobs", project="default") == 2
    assert value(text, "manta_queue_held_jobs", project="default") == 1
    assert value(text, "manta_queue_oldest_timestamp_seconds", project="default") == 100
    assert value(text, "manta_queue_oldest_timestamp_seconds", project="vision") is None
    assert value(text, "manta_jobs_cpus", project="default", state="QUEUED") == 6
    assert value(text, "manta_jobs_gpus", project="default", state="QUEUED") == 1
    assert value(text, "manta_jobs_submitted_total", project="default") == 4
    assert value(text, "manta_job_attempts_total", project="default") == 3


def test_ends_do_not_fall_when_a_job_is_tried_again(service: Secured) -> None:
    add(service, "a", "FAILED")
    before = scrape(service)
    service.parts.jobs.retry("a")
    after = scrape(service)
    for text in (before, after):
        assert value(text, "manta_jobs_ended_total", state="FAILED", project="default") == 1
        assert value(text, "manta_jobs_ended_total", state="SUCCEEDED", project="default") == 0
    assert (value(before, "manta_jobs", state="FAILED"), value(after, "manta_jobs", state="FAILED")) == (1, 0)


def test_a_second_front_end_and_one_after_a_restart_say_the_same(service: Secured, tmp_path: Path) -> None:
    add(service, "a", "RUNNING", attempt=2)
    a_run(service, "a")
    again = Secured(tmp_path)
    ours, theirs = (
        {n: f for n, f in families(scrape(s)).items() if n.startswith(("manta_j", "manta_run"))}
        for s in (service, again)
    )
    again.close()
    assert ours == theirs and len(ours) > 15


def test_a_run_is_told_by_what_it_wrote(service: Secured) -> None:
    add(service, "a", "RUNNING")
    run = a_run(service, "a")
    text = scrape(service)
    expected = {
        "step": 70,
        "total_steps": 200,
        "warnings": 1,
        "skipped_samples_total": 1500,
        "training_seconds_total": 12.5,
        "loss": 2.5,
        "samples_per_second": 640,
        "step_seconds": 0.1,
        "data_wait_ratio": 0.25,
        "memory_bytes": 2 * 2**30,
        "mfu_ratio": None,
        "checkpoint_step": 50,
        "checkpoint_timestamp_seconds": 550,
        "checkpoint_write_seconds": 0.5,
        "checkpoint_bytes": 1000,
        "mirror_backlog_checkpoints": 2,
    }
    assert {name: value(text, f"manta_run_{name}", job_id="a") for name in expected} == expected
    assert value(text, "manta_run_info", job_id="a", project="default", name="toy", method="mae") == 1
    (run.checkpoints / MIRRORED).write_text("25")
    assert value(scrape(service), "manta_run_mirror_backlog_checkpoints", job_id="a") == 1


def test_only_runs_at_work_have_series_and_a_broken_one_hides_no_other(service: Secured) -> None:
    for job_id, state in (("a", "RUNNING"), ("b", "SUCCEEDED"), ("c", "RUNNING"), ("d", "RUNNING")):
        add(service, job_id, state)
        a_run(service, job_id)
    (service.settings.runs / "c" / "record.json").write_text("{")
    shutil.rmtree(service.settings.runs / "d")
    add(service, "release", "RUNNING")
    with service.store.session() as session:  # an entry of a list, which has no run
        session.query(Job).filter_by(id="release").one().spec = {"name": "go", "deploy": {"model": "digits"}}
    text = scrape(service)
    steps = {sample.labels["job_id"] for sample in families(text)["manta_run_step"].samples}
    info = {sample.labels["job_id"] for sample in families(text)["manta_run_info"].samples}
    assert (steps, info) == ({"a"}, {"a", "c", "d"})


def test_series_are_bounded_by_the_newest_runs(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST == 500
    monkeypatch.setattr("service.observe.run_metrics.MOST", 2)
    for number in range(4):
        add(service, f"job-{number}", "RUNNING", submitted_at=float(number))
    info = next(iter(RunMetrics(service.store, service.settings.runs).collect()))
    assert [sample.labels["job_id"] for sample in info.samples] == ["job-3", "job-2"]


def test_requests_are_told_by_route_and_method_that_exist(service: Secured) -> None:
    client = service.client()
    add(service, "secret-name", "QUEUED")
    for path in ("/v1/jobs/secret-name", "/v1/jobs/other", "/v1/jobs/third", "/nowhere/secret-name"):
        client.get(path)
    client.request("BREW", "/v1/jobs")
    text = scrape(service)
    name, route = "manta_http_request_duration_seconds_count", "/v1/jobs/{job_id}"
    assert value(text, name, method="GET", route=route, status="200") == 1
    assert value(text, name, method="GET", route=route, status="404") == 2
    assert value(text, name, method="GET", route="none", status="404") == 1
    assert value(text, name, method="other", status="405") == 1
    assert "secret-name" not in text and "BREW" not in text and "nowhere" not in text


def test_refusals_and_bugs_count_too(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    token = service.token("root", "admin")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(service.parts.jobs, "list", broken)
    assert service.client().get("/v1/jobs").status_code == 401
    assert service.client(token).get("/v1/jobs").status_code == 500
    text = scrape(service, token)
    name = "manta_http_request_duration_seconds_count"
    assert value(text, name, method="GET", route="none", status="401") == 1
    assert value(text, name, method="GET", route="/v1/jobs", status="500") == 1


def test_the_reconciler_tells_of_its_rounds(service: Secured) -> None:
    rounds = service.parts.reconciler.rounds
    before = scrape(service)
    service.job()
    with rounds.timed():
        service.parts.reconciler.round()
    with pytest.raises(ValueError), rounds.timed():
        raise ValueError
    text = scrape(service)
    assert (value(before, "manta_ray_up"), value(text, "manta_ray_up")) == (0, 1)
    assert value(text, "manta_reconciler_round_seconds_count") == 2
    assert value(text, "manta_reconciler_rounds_failed_total") == 1
    assert value(text, "manta_reconciler_acts_total", act="submit") == 1
    assert value(text, "manta_reconciler_last_round_timestamp_seconds") > 0  # type: ignore[operator]
    assert value(text, "manta_reconciler_up") == 0  # its thread was never started here
    service.ray.away = True
    service.parts.reconciler.round()
    assert value(scrape(service), "manta_ray_up") == 0


def test_a_round_that_failed_is_not_the_last_one_that_ended() -> None:
    rounds = Rounds()
    with pytest.raises(ValueError), rounds.timed():
        raise ValueError
    last = next(family for family in rounds.collect() if family.name.endswith("timestamp_seconds"))
    assert last.samples[0].value == 0


def test_a_scraper_is_a_viewer_of_all_projects(service: Secured) -> None:
    service.project("vision")
    service.token("root", "admin")
    assert service.client().get("/metrics").status_code == 401
    answer = service.client(service.token("near", "admin", "vision")).get("/metrics")
    assert answer.status_code == 403 and "all projects" in answer.json()["detail"]
    assert scrape(service, service.token("prometheus", "viewer"))


def test_openmetrics_for_who_asks_for_it(service: Secured) -> None:
    answer = service.client().get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text") and answer.text.endswith("# EOF\n")


def everything(service: Secured) -> str:
    """A scrape in which every family has a sample."""
    add(service, "a", "RUNNING", attempt=1)
    add(service, "b", "QUEUED")
    run = a_run(service, "a")
    point = {"step": 90, "loss": 2.0, "samples_per_s": 1, "step_time_s": 1, "data_wait_share": 0, "memory_gib": 1}
    run.metrics.write_text(json.dumps(point | {"mfu": 0.4}) + "\n")
    service.client().get("/v1/jobs")
    return scrape(service)


def test_names_follow_the_conventions_of_prometheus(service: Secured) -> None:
    """https://prometheus.io/docs/practices/naming/: one prefix, base units, help, _total behind what counts."""
    found = families(everything(service))
    ours = {name: family for name, family in found.items() if not name.startswith("process_")}
    assert len(ours) > 30
    for name, family in ours.items():
        assert re.fullmatch(r"manta_[a-z][a-z0-9_]*", name) and family.samples, name
        assert family.documentation[0].isupper() and family.documentation.endswith("."), name
        assert not OTHER_UNITS.search(name), name
        assert not name.endswith("_total") and not name.endswith("_created"), (
            name
        )  # the parser takes _total off counters
        if family.type == "counter":
            assert all(sample.name == f"{name}_total" for sample in family.samples), name
        if "timestamp" in name or family.type == "histogram":
            assert name.endswith("_seconds"), name


def test_promtool_finds_nothing(service: Secured) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it comes with Prometheus (apt install prometheus)")
    done = subprocess.run([promtool, "check", "metrics"], input=everything(service), capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
