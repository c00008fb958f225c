import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve import RunTarget
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
)

from service import deployments
from service.deployments import Deployments, decide, reason_of
from service.errors import NotDeployed, NotFound, Unavailable
from service.registry import Registry
from service.settings import Settings
from service.store import Deployment, ModelVersion, Store

FAILURE = """The deployment failed to start 1 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:model-m:predictor.initialize_and_get_metadata()\x1b[39m (pid=7, ip=127.0.0.1)
  File "artifact.py", line 63, in read_card
workloads.artifact.ArtifactError: got /gone, expected an artifact folder
"""


def overview(status: str, message: str = "") -> ApplicationStatusOverview:
    replica = DeploymentStatusOverview(
        DeploymentStatus.UPDATING, DeploymentStatusTrigger.CONFIG_UPDATE_STARTED, {}, message
    )
    return ApplicationStatusOverview(ApplicationStatus(status), "Failed to update", 0.0, {"predictor": replica})


class FakeServe:
    """Applications with a state each; what is asked for is DEPLOYING at once, as in Ray."""

    def __init__(self) -> None:
        self.apps: dict[str, ApplicationStatusOverview] = {"api": overview("RUNNING")}
        self.references: list[str] = []
        self.away = False

    def status(self) -> Any:
        if self.away:
            raise RayActorError()
        return SimpleNamespace(applications=dict(self.apps))

    def run_many(self, targets: list[RunTarget], **options: bool) -> None:
        assert not any(options.values())
        if self.away:
            raise RayActorError()
        for target in targets:
            assert target.route_prefix is None
            self.apps[target.name] = overview("DEPLOYING")
            self.references.append(target.target)

    def delete(self, name: str, _blocking: bool) -> None:
        if self.away:
            raise RayActorError()
        del self.apps[name]

    def get_app_handle(self, name: str) -> str:
        assert self.apps[name].status == "RUNNING"
        return f"handle of {name} {self.references[-1]}"


@pytest.fixture
def fake() -> FakeServe:
    return FakeServe()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Settings, a store and a registry with `digits` 1 and 2, `faces` 1."""
    monkeypatch.setattr(deployments, "application", lambda *arguments, **_: arguments[-1])
    monkeypatch.setattr(deployments, "POLL_S", 0.0)
    settings = Settings(home=tmp_path)
    store = Store(settings.database)
    with store.session() as session:
        for name, version in (("digits", 1), ("digits", 2), ("faces", 1)):
            session.add(ModelVersion(name=name, version=version, kind="x", job_id=f"j{version}", source="a", card={}))
    yield SimpleNamespace(settings=settings, store=store, registry=Registry(settings, store))
    store.close()


def service(home: SimpleNamespace, fake: FakeServe) -> Deployments:
    """A fresh process over the same database and the same Ray."""
    return Deployments(home.settings, home.store, home.registry, fake)


def state(home: SimpleNamespace, name: str = "digits") -> tuple[int, str]:
    row = home.store.get_deployment(name)
    return row.version, row.state


@pytest.mark.parametrize(
    ("row_state", "app", "asked", "expected"),
    [
        ("DEPLOYING", None, 1, ("start", "DEPLOYING")),
        ("RUNNING", None, None, ("start", "DEPLOYING")),
        ("FAILED", None, None, ("start", "DEPLOYING")),
        ("RUNNING", "DELETING", 1, ("start", "DEPLOYING")),
        ("DEPLOYING", "RUNNING", None, ("start", "DEPLOYING")),  # of an older version, perhaps
        ("RUNNING", "RUNNING", None, ("none", "RUNNING")),
        ("DEPLOYING", "RUNNING", 1, ("none", "RUNNING")),
        ("RUNNING", "RUNNING", 2, ("start", "DEPLOYING")),  # deployed by another front end while Serve was away here
        ("RUNNING", "RUNNING", 0, ("start", "DEPLOYING")),
        ("RUNNING", "DEPLOYING", None, ("none", "DEPLOYING")),
        ("DEPLOYING", "DEPLOY_FAILED", 1, ("none", "FAILED")),
        ("RUNNING", "UNHEALTHY", 1, ("none", "FAILED")),
        ("FAILED", "RUNNING", 1, ("none", "RUNNING")),  # it recovered
    ],
)
def test_decide(row_state: Any, app: str | None, asked: int | None, expected: tuple[str, str]) -> None:
    row = Deployment(name="m", version=1, state=row_state)
    decision = decide(row, overview(app, FAILURE) if app else None, asked=asked)
    assert (decision.act, decision.state) == expected
    assert (decision.reason is not None) == (decision.state == "FAILED")


def test_the_reason_is_the_exception_without_traceback_process_and_colours() -> None:
    reason = "ArtifactError: got /gone, expected an artifact folder"
    assert reason_of(overview("DEPLOY_FAILED", FAILURE)) == reason
    assert reason_of(overview("DEPLOY_FAILED")) == "Failed to update"


def test_a_model_is_deployed_once_in_its_newest_version(home: SimpleNamespace, fake: FakeServe) -> None:
    service_ = service(home, fake)
    assert service_.deploy("digits").state == "DEPLOYING"
    service_.deploy("digits", 2)
    assert fake.references == ["digits@2"]
    fake.apps["model-digits"] = overview("RUNNING")
    assert service_.wait("digits", 10).state == "RUNNING"
    assert service_.view("digits") == {"model": "digits@2", "state": "RUNNING", "reason": None}
    assert service_.deploy("digits").state == "RUNNING" and fake.references == ["digits@2"]
    assert service_.view("faces") is None


def test_waiting_ends_with_the_time(home: SimpleNamespace, fake: FakeServe) -> None:
    service_ = service(home, fake)
    service_.deploy("digits")
    assert service_.wait("digits", 0.0).state == "DEPLOYING"


def test_another_version_replaces_in_place_and_the_handle_goes_on(home: SimpleNamespace, fake: FakeServe) -> None:
    service_ = service(home, fake)
    service_.deploy("digits", 1)
    fake.apps["model-digits"] = overview("RUNNING")
    handle = asyncio.run(service_.handle("digits"))
    assert service_.deploy("digits", 2).state == "DEPLOYING"
    assert fake.references == ["digits@1", "digits@2"]
    assert asyncio.run(service_.handle("digits")) == handle  # the old version answers until the new one does


def test_a_failed_deployment_says_why_and_is_tried_again_when_asked(home: SimpleNamespace, fake: FakeServe) -> None:
    service_ = service(home, fake)
    service_.deploy("digits")
    fake.apps["model-digits"] = overview("DEPLOY_FAILED", FAILURE)
    assert service_.get("digits").reason == "ArtifactError: got /gone, expected an artifact folder"
    with pytest.raises(NotDeployed, match="got /gone"):
        asyncio.run(service_.handle("digits"))
    service_.reconcile()
    assert fake.references == ["digits@2"]
    assert service_.deploy("digits").reason is None
    assert fake.references == ["digits@2", "digits@2"]


def test_a_model_has_a_handle_only_while_it_runs(home: SimpleNamespace, fake: FakeServe) -> None:
    service_ = service(home, fake)
    with pytest.raises(NotFound, match="digits"):
        asyncio.run(service_.handle("digit"))
    with pytest.raises(NotDeployed, match="POST /v1/models/digits/deploy"):
        asyncio.run(service_.handle("digits"))
    service_.deploy("digits")
    with pytest.raises(Unavailable, match="is being deployed"):
        asyncio.run(service_.handle("digits"))
    fake.apps["model-digits"] = overview("RUNNING")
    assert asyncio.run(service_.handle("digits")) == "handle of model-digits digits@2"
    service_.undeploy("digits")
    assert list(fake.apps) == ["api"]
    for call in (lambda: asyncio.run(service_.handle("digits")), lambda: service_.undeploy("digits")):
        with pytest.raises(NotDeployed):
            call()


def test_unknown_models_and_versions_leave_no_row(home: SimpleNamespace, fake: FakeServe) -> None:
    for name, version in (("digit", None), ("digits", 3)):
        with pytest.raises(NotFound, match=r"digits|\[2, 1\]"):
            service(home, fake).deploy(name, version)
    assert home.store.list_deployments() == [] and fake.references == []


def test_after_ray_was_restarted_everything_wanted_comes_back(home: SimpleNamespace, fake: FakeServe) -> None:
    for name in ("digits", "faces"):
        service(home, fake).deploy(name)
        fake.apps[f"model-{name}"] = overview("RUNNING")
    new = FakeServe()
    restarted = service(home, new)
    restarted.reconcile()
    assert sorted(new.references) == ["digits@2", "faces@1"]
    assert state(home, "digits") == (2, "DEPLOYING")
    new.apps |= {"model-digits": overview("RUNNING"), "model-faces": overview("DEPLOY_FAILED", FAILURE)}
    restarted.reconcile()
    assert state(home, "digits") == (2, "RUNNING") and state(home, "faces") == (1, "FAILED")
    assert len(new.references) == 2


def test_a_service_that_ended_between_row_and_serve_finishes_what_it_began(
    home: SimpleNamespace, fake: FakeServe
) -> None:
    service(home, fake).deploy("digits", 1)
    fake.apps["model-digits"] = overview("RUNNING")
    home.store.put_deployment("digits", 2, "DEPLOYING", None)
    restarted = service(home, fake)
    restarted.reconcile()
    restarted.reconcile()
    assert fake.references == ["digits@1", "digits@2"]


def test_an_application_that_nobody_wants_is_ended_by_the_next_start(home: SimpleNamespace, fake: FakeServe) -> None:
    fake.apps["model-digits"] = overview("RUNNING")
    service(home, fake).reconcile()
    assert list(fake.apps) == ["api"]


def test_an_undeploy_that_serve_did_not_hear_is_repeated(home: SimpleNamespace, fake: FakeServe) -> None:
    service_ = service(home, fake)
    service_.deploy("digits")
    fake.away = True
    service_.undeploy("digits")
    assert service_.view("digits") is None
    fake.away = False
    service_.reconcile()
    assert list(fake.apps) == ["api"]


def test_a_wanted_model_is_started_once_serve_is_back(home: SimpleNamespace, fake: FakeServe) -> None:
    service_ = service(home, fake)
    fake.away = True
    with pytest.raises(Unavailable, match="Ray Serve does not answer"):
        service_.deploy("digits")
    assert state(home) == (2, "DEPLOYING")
    fake.away = False
    service_.reconcile()
    assert fake.references == ["digits@2"]


def test_serve_is_left_alone_while_nothing_changes(home: SimpleNamespace, fake: FakeServe) -> None:
    service_ = service(home, fake)
    service_.reconcile()
    fake.away = True  # nothing is wanted: nobody asks
    service_.reconcile()
    fake.away = False
    service_.deploy("digits")
    fake.apps["model-digits"] = overview("RUNNING")
    service_.reconcile()
    fake.away = True
    service_.reconcile()
    assert state(home) == (2, "RUNNING")


def test_settings_reach_the_replica(home: SimpleNamespace, fake: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, float]] = []
    monkeypatch.setattr(deployments, "application", lambda *_, **options: told.append(options))
    home.settings = Settings(home=home.settings.home, max_image_pixels=1234, predictor_cpus=2)
    service(home, fake).deploy("digits")
    assert told == [{"max_pixels": 1234, "cpus": 2}]
