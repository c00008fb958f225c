"""A whole service in this process, with projects, tokens and a clock that stands still."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from service.app import build
from service.errors import NotDeployed
from service.parts import build_parts
from service.principal import ALL, LOCAL, Principal, Role
from service.settings import Settings
from service.store import Deployment, ModelName, ModelVersion, Webhook
from tests.service.fakes import FakeRay, Inline, local_client
from tests.toy import TOY_MAE, TOY_MODEL
from workloads.preflight import Check

BODY: dict[str, Any] = {
    "name": "toy",
    "method": TOY_MAE,
    "model": TOY_MODEL,
    "data": {"train": {"shards": "/data/x.tar"}},
    "epochs": 1,
}
DAY_S = 86400.0


class NoServe:
    """Knows every model and serves none."""

    async def handle(self, name: str) -> None:
        raise NotDeployed(f"{name} is not deployed", "deploy it")

    def view(self, name: str) -> None:
        return None

    def deploy(self, name: str, version: int | None) -> Deployment:
        return Deployment(name=name, version=version or 1, state="DEPLOYING")

    def reconcile(self) -> None:
        pass

    def undeploy(self, name: str) -> None:
        raise NotDeployed(f"{name} is not deployed", "deploy it")


class Secured:
    """The app, its parts and its tokens; jobs are not looked at beyond their form, so they are made in milliseconds."""

    def __init__(
        self, home: Path, check: Check = lambda *_: [], deployments: Any = None, root: str = "/data", **more: Any
    ) -> None:
        self.now = 1_000_000.0
        self.settings = Settings(home=home, database_url="", reconcile_interval_s=3600, allowed_roots=(root,), **more)
        self.ray = FakeRay()
        self.parts = build_parts(
            self.settings,
            ray=self.ray,  # type: ignore[arg-type]
            deployments=deployments or NoServe(),
            check=check,
            clock=lambda: self.now,
            wake=lambda: None,
            checkers=Inline(),
        )
        self.store = self.parts.store
        self.app = build(self.settings, self.parts)

    def close(self) -> None:
        self.store.close()

    def project(self, name: str) -> None:
        self.parts.projects.create(LOCAL, name)

    def token(self, name: str, role: Role, project: str = ALL, lifetime_s: float | None = DAY_S) -> str:
        return self.parts.tokens.create(LOCAL, name, role, project, lifetime_s)[1]

    def client(self, token: str | None = None) -> TestClient:
        return local_client(self.app, **({} if token is None else {"Authorization": f"Bearer {token}"}))

    def job(self, owner: str = "ann", project: str = "default") -> str:
        by = Principal(owner, project, "submitter", "tok-0")
        return self.parts.submissions.submit(BODY, None, by, project)[0].id

    def webhook(self, project: str = "default") -> str:
        """Made past the limit of a project, and without a look at its name."""
        row = Webhook(
            id=f"hook-{uuid.uuid4().hex[:12]}",
            project=project,
            url="https://x.example",
            states=["FAILED"],
            secret="whsec_c2VjcmV0",
            created_by="ann",
            created_at=self.now,
        )
        with self.store.session() as session:
            session.add(row)
        return row.id

    def model(self, name: str, project: str = "default") -> None:
        with self.store.session() as session:
            session.add(ModelName(name=name, project=project))
            session.add(ModelVersion(name=name, version=1, kind="encoder", job_id="j", source="artifact", card={}))
