"""Canaries: secrets are planted wherever one may come from, and looked for in everything that the service wrote."""

from __future__ import annotations

import ast
import io
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.exc import OperationalError

from cluster.job_environment import foreign, without_foreign
from service import ray_jobs
from service.client import Client
from service.ray_jobs import RayJobs
from service.settings import Settings
from service.store import Store
from tests.service.secured import BODY, Secured
from workloads import tracing
from workloads.log_lines import json_formatter

ROOT = Path(__file__).parents[2]
CANARY = "canary-5e1f"
ENVIRONMENT = {
    "GITHUB_TOKEN": f"ghp-{CANARY}",
    "MANTA_TOKEN": f"manta_{CANARY}",
    "MANTA_DATABASE_URL": f"postgresql://manta:{CANARY}@db/manta",
    "PGPASSWORD": CANARY,
    "OPENAI_API_KEY": f"sk-{CANARY}",
    "INTERNAL_REGISTRY": f"https://user:{CANARY}@registry.example",
    "DEPLOY_KEY_FILE_TEXT": f"-----BEGIN OPENSSH PRIVATE KEY-----{CANARY}",
    "MY_SECRET": CANARY,
}
OF_JOBS = {"AWS_SECRET_ACCESS_KEY": "data", "HF_TOKEN": "hub", "MLFLOW_TRACKING_PASSWORD": "curves", "PATH": "/bin"}


class FakeSubmission:
    """Ray's client of jobs: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, **options: Any) -> None:
        self.told.append(options)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (ENVIRONMENT | OF_JOBS).items():
        monkeypatch.setenv(name, value)


def submission(settings: Settings, job_id: str = "job-1") -> dict[str, Any]:
    """What Ray is told of a job."""
    jobs, client = RayJobs(settings), FakeSubmission()
    jobs._client, jobs._reserved = client, lambda _: {}  # type: ignore[method-assign]  # no spec was written
    jobs.submit(job_id, 1)
    return client.told[0]


def test_a_job_inherits_no_foreign_secret(planted: None, tmp_path: Path) -> None:
    told = submission(Settings(home=tmp_path))
    assert CANARY not in str(told)
    inherited = dict(os.environ) | told["runtime_env"]["env_vars"]  # as Ray starts it
    assert not [name for name, value in inherited.items() if CANARY in value]
    assert {name: inherited[name] for name in OF_JOBS} == OF_JOBS
    assert inherited["MANTA_JOB_ID"] == "job-1"


def test_what_another_node_has_of_the_service_is_hidden_as_well(tmp_path: Path) -> None:
    hidden = submission(Settings(home=tmp_path))["runtime_env"]["env_vars"]
    assert [hidden[f"MANTA_{name}"] for name in ("DATABASE_URL", "FIRST_ADMIN_TOKEN_FILE", "TOKEN")] == [""] * 3


def test_credentials_of_jobs_are_a_setting(planted: None, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, job_credentials="MY_SECRET HF_*")
    inherited = dict(os.environ) | submission(settings)["runtime_env"]["env_vars"]
    assert (inherited["MY_SECRET"], inherited["HF_TOKEN"]) == (CANARY, "hub")
    assert inherited["AWS_SECRET_ACCESS_KEY"] == inherited["GITHUB_TOKEN"] == ""


def test_the_head_of_a_cluster_gets_none_either() -> None:
    left = without_foreign(ENVIRONMENT | OF_JOBS | {"MANTA_HOST": "0.0.0.0", "HOME": "/root", "LANG": "C"})
    assert left == OF_JOBS | {"HOME": "/root", "LANG": "C"}
    harmless = {
        "TOKENIZERS_PARALLELISM": "0",
        "RAY_AUTH_TOKEN_PATH": "/x",
        "HTTPS_PROXY": "http://u:p@proxy",
        "PWD": "/",
    }
    assert foreign(harmless) == []


@given(st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,40}", fullmatch=True))
def test_what_ray_runs_is_the_same_for_every_job_but_its_id(job_id: str) -> None:
    """The shell that Ray starts sees our program and our path; the JobSpec is in a file."""
    settings = Settings(home=Path("/srv/a home; rm -rf $HOME"))
    command = submission(settings, job_id)["entrypoint"]
    assert shlex.split(command) == [sys.executable, "-m", "workloads.run", f"{settings.runs}/{job_id}/job.json"]


def test_nothing_starts_a_shell() -> None:
    """No field of a job can reach one. (`pipe:` of webdataset does; the service refuses it.)"""
    shells = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
    found = []
    for path in (p for package in ("service", "workloads", "cluster") for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                shell = any(k.arg == "shell" and getattr(k.value, "value", None) is not False for k in node.keywords)
                if name in shells or shell:
                    found.append(f"{path}:{node.lineno}")
    assert found == []


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path / "home")
    yield service
    service.close()


def test_canaries_in_everything_that_the_service_wrote(
    planted: None, service: Secured, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that succeed, are refused and break, with secrets in each place where somebody may put one."""
    caplog.set_level(logging.DEBUG)
    lines, spans = io.StringIO(), InMemorySpanExporter()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(json_formatter())
    logging.getLogger().addHandler(handler)
    tracing.start("test", spans)
    monkeypatch.setattr(ray_jobs.RayJobs, "_connected", lambda _: pytest.fail("Ray is not asked here"))
    token = service.token("root", "admin")
    client = service.client(token)
    answers = [client.post("/v1/jobs", json=BODY)]
    job_id = answers[0].json()["id"]
    urls = (f"s3://AK:{CANARY}@bucket/x", f"https://host/x?X-Amz-Signature={CANARY}", f"https://u:{CANARY}@host/x")
    for url in urls:
        answers.append(client.post("/v1/jobs", json=BODY | {"data": {"train": {"shards": url}}}))
        answers.append(client.post("/v1/jobs", json=BODY | {"init": url}))
        answers.append(client.post("/v1/jobs", json=BODY | {"checkpoint": {"mirror": url}}))
    assert [answer.status_code for answer in answers] == [201] + [422] * 9
    wrong = {"Authorization": f"Bearer manta_{CANARY}"}
    answers += [service.client().get(path, headers=wrong) for path in ("/v1/jobs", "/healthz", "/nowhere")]
    answers.append(service.client().get("/v1/jobs", headers={"Authorization": f"Basic {CANARY}"}))
    answers.append(service.client().get("/v1/jobs", headers={"X-Request-ID": f"{CANARY} and more"}))
    made = client.post("/v1/tokens", json={"name": "new", "role": "viewer"}).json()
    answers += [
        client.get(path) for path in ("/v1/tokens", "/v1/audit", f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/report")
    ]
    answers.append(client.delete(f"/v1/tokens/{made['id']}"))
    answers.append(client.get("/v1/jobs", headers={"Authorization": f"Bearer {made['token']}"}))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    def away(*_: object, **__: object) -> None:
        raise OperationalError("SELECT", {"hash": CANARY}, Exception("no route"), hide_parameters=True)

    for fault in (broken, away):
        monkeypatch.setattr(service.parts.jobs, "list", fault)
        answers.append(client.get("/v1/jobs"))
    assert [answer.status_code for answer in answers[-2:]] == [500, 503]
    service.parts.reconciler.round()
    answers.append(client.get("/metrics"))
    service.store.close()
    tracing.stop()
    logging.getLogger().removeHandler(handler)
    told = lines.getvalue() + "".join(span.to_json() for span in spans.get_finished_spans())
    assert '"token": "root"' in told and '"http.route": "/v1/jobs"' in told

    secrets = (CANARY, token, token.removeprefix("manta_"), made["token"])
    written = [path for path in service.settings.home.rglob("*") if path.is_file()]
    assert {"manta.db", "job.json"} <= {path.name for path in written}  # it did write
    for secret in secrets:
        for path in written:
            assert secret.encode() not in path.read_bytes(), path
        assert secret not in caplog.text and secret not in told
        for answer in answers:
            assert secret not in answer.text + str(answer.headers), answer.request.url


def test_settings_do_not_show_their_password(planted: None) -> None:
    settings = Settings()
    assert CANARY in settings.database  # for the driver
    for text in (repr(settings), str(settings), settings.model_dump_json(), repr(SimpleNamespace(settings=settings))):
        assert CANARY not in text


def test_a_database_that_does_not_answer_does_not_tell_its_password() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(OperationalError) as caught:
        Store(f"postgresql+psycopg://manta:{CANARY}@127.0.0.1:1/manta")
    assert "127.0.0.1" in str(caught.value) and CANARY not in str(caught.value)


def test_a_client_does_not_show_its_token() -> None:
    client = Client("http://manta", token=CANARY)
    assert CANARY not in repr(client) + repr(client._http.headers) + str(client.__dict__)
    client.close()
