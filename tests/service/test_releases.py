"""Deployments as entries of a list: their states, who may ask for them, and crashes at each moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from typer.testing import CliRunner, Result

from service import cli, client, deployments
from service.app import build
from service.decisions import Decision
from service.deployments import Deployments
from service.parts import build_parts
from service.registry import Registry
from service.releases import decide
from service.settings import Settings
from service.store import Deployment, Job, ModelName, ModelVersion, Store
from tests.service.fakes import FakeRay, Inline, local_client, write_record
from tests.service.secured import Secured
from tests.service.test_deployments import FakeServe, overview
from tests.service.world import BODY
from tests.toy_artifact import write_artifact

TRAIN = BODY | {"name": "train", "register": "digits"}
LIVE = {"name": "go-live", "deploy": {"model": "digits"}}


class Line:
    """A service over a fake Ray and a fake Serve; the reconciler is turned by hand, `restart` is a crash."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, reconcile_interval_s=3600)
        self.ray, self.serve = FakeRay(), FakeServe()
        self.stores: list[Store] = []
        self.restart()

    def restart(self) -> None:
        store = Store(self.settings.database)
        serving = Deployments(self.settings, store, Registry(self.settings, store), self.serve)
        wait = {"check": lambda *_: [], "wake": lambda: None, "checkers": Inline()}
        self.parts = build_parts(self.settings, ray=self.ray, deployments=serving, **wait)  # type: ignore[arg-type]
        self.stores += [store, self.parts.store]

    def client(self) -> TestClient:
        return local_client(build(self.settings, self.parts))

    def submit(self, *entries: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self.client().post("/v1/jobs:batch", json=list(entries))
        assert answer.status_code == 201, answer.text
        made: list[dict[str, Any]] = answer.json()["jobs"]
        return made

    def round(self, times: int = 1) -> None:
        for _ in range(times):
            self.parts.reconciler.round()

    def trained(self, job_id: str) -> None:
        """Its run succeeds, and is registered."""
        self.round()
        folder = self.settings.runs / job_id
        write_artifact(folder / "artifact", "encoder")
        write_record(folder, "SUCCEEDED")
        self.round()

    def seen(self, job_id: str) -> tuple[str, str | None]:
        row = self.parts.jobs.get(job_id)
        return row.state, row.reason

    def serve_is(self, state: str, message: str = "") -> None:
        self.serve.apps["model-digits"] = overview(state, message)
        self.parts.deployments._look_at = 0.0

    def kinds(self, job_id: str) -> list[str]:
        return [event["kind"] for event in self.parts.jobs.events(job_id)]


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(deployments, "application", lambda *arguments, **_: arguments[-1])
    line = Line(tmp_path)
    yield line
    for store in line.stores:
        store.close()


def registered(line: Line, name: str = "digits", project: str = "default", versions: int = 1) -> None:
    with line.parts.store.session() as session:
        session.add(ModelName(name=name, project=project))
        for version in range(1, versions + 1):
            session.add(ModelVersion(name=name, version=version, kind="x", job_id=f"j{version}", source="a", card={}))


def test_train_and_deploy_are_one_list(line: Line) -> None:
    train, live = line.submit(TRAIN, LIVE)
    assert (live["state"], live["reason"]) == ("QUEUED", f"waits for {train['id']}")
    assert (live["after"], live["deploy"], live["method"]) == ([train["id"]], "digits", None)
    line.round(2)
    assert line.ray.submitted == [(train["id"], 1)] and line.serve.references == []
    line.trained(train["id"])
    line.round(3)
    assert line.seen(live["id"]) == ("RUNNING", "digits@1 is being deployed")
    line.serve_is("RUNNING")
    line.round(2)
    assert line.seen(live["id"]) == ("SUCCEEDED", "digits@1 is served")
    assert line.serve.references == ["digits@1"] and line.ray.submitted == [(train["id"], 1)]
    assert line.kinds(live["id"]) == ["queued", "running", "succeeded"]
    answer = line.client().get(f"/v1/jobs/{live['id']}").json()
    assert answer["started_at"] is not None and answer["finished_at"] is not None


def test_the_version_of_the_list_is_deployed_also_when_another_job_registers_a_later_one(line: Line) -> None:
    registered(line, versions=2)
    train, live = line.submit(TRAIN, LIVE)
    line.trained(train["id"])  # digits@3
    with line.parts.store.session() as session:
        session.add(ModelVersion(name="digits", version=4, kind="x", job_id="j4", source="a", card={}))
    line.round(3)
    assert line.seen(live["id"])[1] == "digits@3 is being deployed" and line.serve.references == ["digits@3"]


def test_what_is_there_is_pinned_when_it_is_submitted(line: Line) -> None:
    registered(line, versions=2)
    (live,) = line.submit(LIVE)
    assert live["spec"]["deploy"] == {"model": "digits", "version": 2} and live["reason"] is None
    (old,) = line.submit({"name": "back", "deploy": {"model": "digits", "version": 1}})
    assert old["spec"]["deploy"]["version"] == 1
    line.round()
    assert line.seen(live["id"]) == ("RUNNING", "digits@2 is being deployed")
    line.round()
    assert line.seen(live["id"]) == ("FAILED", "digits@1 was deployed in place of version 2")
    line.serve_is("RUNNING")
    line.round(2)
    assert line.seen(old["id"]) == ("SUCCEEDED", "digits@1 is served")


def test_a_clone_deploys_the_same_and_a_diff_tells_the_versions(line: Line) -> None:
    registered(line, versions=2)
    (live,) = line.submit(LIVE)
    client = line.client()
    clone = client.post(f"/v1/jobs/{live['id']}:clone", json={"deploy": {"version": 1}}).json()
    assert clone["spec"]["deploy"] == {"model": "digits", "version": 1}
    diff = client.get(f"/v1/jobs/{live['id']}/diff/{clone['id']}").json()
    assert diff == {
        "a": live["id"],
        "b": clone["id"],
        "spec": [{"path": "deploy.version", "a": 2, "b": 1}],
        "provenance": [],
    }
    train, entry = line.submit(TRAIN, LIVE)
    again = client.post(f"/v1/jobs/{entry['id']}:clone", json={}).json()
    assert again["after"] == [train["id"]]  # of which it deploys what it registers, as the first does


def test_what_other_requests_make_of_it(line: Line) -> None:
    registered(line)
    (live,) = line.submit(LIVE)
    client, path = line.client(), f"/v1/jobs/{live['id']}"
    dry = client.post("/v1/jobs?dry_run=true", json=LIVE)
    assert dry.status_code == 422 and "computes nothing" in dry.json()["detail"]
    report = client.get(f"{path}/report")
    assert report.status_code == 404 and report.json()["hint"] == "GET /v1/models/digits"
    for name in ("metrics", "evaluations", "events"):
        assert client.get(f"{path}/{name}").status_code == 200
    assert client.post(f"{path}:pause").json()["state"] == "PAUSED"
    assert client.post(f"{path}:resume", json={"max_duration": 60}).status_code == 409
    assert client.post(f"{path}:resume", json={}).json()["state"] == "QUEUED"
    line.round()
    assert client.post(f"{path}:cancel").json()["state"] == "CANCELLING"
    line.round()
    assert line.seen(live["id"]) == ("CANCELLED", "cancelled on request; digits is served as far as it has come")


@pytest.mark.parametrize(
    ("entry", "loc", "words"),
    [
        ({"deploy": {"model": "digist"}}, ["deploy", "model"], "got model 'digist', which is not registered"),
        ({"deploy": {"model": "digits", "version": 7}}, ["deploy", "model"], "got version 7 of digits"),
        ({"deploy": {"model": "theirs"}}, ["deploy", "model"], "got model 'theirs', which is not registered"),
        ({"deploy": {"model": "digits", "verison": 1}}, ["deploy", "verison"], "did you mean 'version'"),
        ({"deploy": {}}, ["deploy", "model"], "expected a value"),
        ({"deploy": {"model": "digits"}, "epochs": 3}, ["epochs"], "got unknown key 'epochs'"),
        ({"deploy": {"model": "../x"}}, ["deploy", "model"], "String should match pattern"),
    ],
)
def test_what_cannot_be_deployed_is_refused_at_once(line: Line, entry: Any, loc: list[str], words: str) -> None:
    registered(line)
    registered(line, "theirs", "other", versions=0)
    refused = line.client().post("/v1/jobs:batch", json=[BODY, {"name": "x"} | entry])
    assert refused.status_code == 422
    (problem,) = refused.json()["errors"]
    assert problem["loc"] == ["jobs", 1, *loc] and words in problem["message"]
    assert line.parts.jobs.list(limit=9) == []  # nor the job before it


def test_a_model_of_an_entry_that_comes_later_is_not_there(line: Line) -> None:
    refused = line.client().post("/v1/jobs:batch", json=[LIVE, TRAIN])
    assert refused.status_code == 422 and "earlier entry" in refused.json()["hint"]


def test_deploying_takes_an_operator(tmp_path: Path) -> None:
    service = Secured(tmp_path)
    service.token("root", "admin")
    body = TRAIN | {"data": {"train": {"shards": "/data/x.tar"}}}
    asked = [
        service.client(service.token(role, role)).post("/v1/jobs:batch", json=[body, LIVE])  # type: ignore[arg-type]
        for role in ("submitter", "operator")
    ]
    assert [answer.status_code for answer in asked] == [403, 201]
    assert "expected operator for `deploy`" in asked[0].json()["detail"]
    service.close()


def test_a_list_whose_training_fails_deploys_nothing(line: Line) -> None:
    train, live = line.submit(TRAIN, LIVE)
    line.round()
    write_record(line.settings.runs / train["id"], "FAILED", reason="why")
    line.ray.known[train["id"]] = "FAILED"
    line.round(2)
    assert line.seen(live["id"]) == ("FAILED", f"{train['id']}, which it comes after, is FAILED")
    assert line.serve.references == []
    for job in (train, live):
        line.client().post(f"/v1/jobs/{job['id']}:retry")
    line.round()
    folder = line.settings.runs / train["id"]
    write_artifact(folder / "artifact", "encoder")
    write_record(folder, "SUCCEEDED", line.parts.jobs.get(train["id"]).attempt)
    line.round(4)
    assert line.seen(live["id"])[0] == "RUNNING"


def test_a_deployment_that_fails_says_why_and_can_be_retried(line: Line) -> None:
    registered(line)
    (live,) = line.submit(LIVE)
    line.round()
    line.serve_is("DEPLOY_FAILED", "ArtifactError: got /gone, expected an artifact folder")
    line.round(2)
    why = "digits@1 could not be deployed: ArtifactError: got /gone, expected an artifact folder"
    assert line.seen(live["id"]) == ("FAILED", why)
    line.client().post(f"/v1/jobs/{live['id']}:retry")
    line.round()
    assert line.seen(live["id"])[0] == "RUNNING"
    line.parts.deployments.undeploy("digits")
    line.round()
    assert line.seen(live["id"]) == ("FAILED", "digits was undeployed meanwhile")


def test_while_serve_is_away_it_waits(line: Line) -> None:
    registered(line)
    (live,) = line.submit(LIVE)
    line.serve.away = True
    with pytest.raises(Exception, match="Ray Serve does not answer"):  # of the deployments, after all jobs
        line.round()
    assert line.seen(live["id"])[0] == "QUEUED"
    line.serve.away = False
    line.round()
    assert line.seen(live["id"])[0] == "RUNNING"


@pytest.mark.parametrize("moment", range(4))
def test_a_crash_of_the_service_at_any_moment_deploys_once(
    line: Line, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before and after each step; what was asked of Serve is not asked for a second time in vain."""
    train, live = line.submit(TRAIN, LIVE)
    line.trained(train["id"])

    class PowerCut(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise PowerCut

    if moment < 3:
        target, name = [
            (line.parts.store, "put_deployment"),
            (line.parts.deployments._serve, "run_many"),
            (line.parts.reconciler, "_write"),  # Serve was asked, the row does not say so
        ][moment]
        line.round()  # it is checked, and let go
        if moment == 0:
            target = line.parts.deployments._store
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(target, name, die)
            line.round()
    else:
        line.round(2)
        assert line.seen(live["id"])[0] == "RUNNING"
    line.restart()
    line.round(2)
    line.serve_is("RUNNING")
    line.round(2)
    assert line.seen(live["id"]) == ("SUCCEEDED", "digits@1 is served")
    assert set(line.serve.references) == {"digits@1"}
    assert line.kinds(live["id"]) == ["queued", "running", "succeeded"]


def test_a_list_of_files_by_command(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = build(line.settings, line.parts)
    monkeypatch.setattr(client.httpx, "Client", lambda headers, **_: local_client(app, **headers))
    monkeypatch.setenv("MANTA_URL", "http://manta")
    for name, document in (("train", TRAIN), ("live", LIVE), ("wrong", {"name": "x", "deploy": {"modle": "y"}})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))

    def manta(*arguments: str) -> Result:
        return CliRunner().invoke(cli.app, [*arguments])

    submitted = manta("submit", str(tmp_path / "train.yaml"), str(tmp_path / "live.yaml"))
    train, live = (row.split(" ") for row in submitted.stdout.splitlines())
    assert live[1:] == ["QUEUED", "waits", "for", train[0]]
    assert manta("jobs").stdout.splitlines()[1].split("\t")[:4] == [live[0], "go-live", "deploy", "QUEUED"]
    assert "deploys\tdigits" in manta("job", live[0]).stdout
    assert "did you mean 'model'" in manta("submit", str(tmp_path / "wrong.yaml")).stderr
    assert "expected a job of its own" in manta("submit", "--k8s", str(tmp_path / "live.yaml")).stderr


def test_decisions_about_what_is_over() -> None:
    row = Job(id="j", state="PAUSED", spec={"deploy": {"model": "digits"}})
    assert decide(row, None, None, {}) == Decision("none", "PAUSED")
    row.state = "PAUSING"
    assert decide(row, 1, None, {}).state == "PAUSED"
    row.state = "QUEUED"
    assert decide(row, None, None, {}).reason == "nothing before it registered digits"
    row.state = "RUNNING"
    served = Deployment(name="digits", version=1, state="DEPLOYING")
    assert decide(row, 1, served, {}) == Decision("none", "RUNNING", "digits@1 is being deployed")
