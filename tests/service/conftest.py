"""What tests of routes share; a file with another service names its own."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from service import store
from tests.service.fakes import local_client
from tests.service.receivers import Stage
from tests.service.rest import Service
from tests.service.world import World
from tests.toy import TOY_MAE, TOY_MODEL


@pytest.fixture(scope="session", autouse=True)
def migrated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new SQLite database is a copy of one that was migrated, which saves a fifth of a second each time."""
    template = tmp_path_factory.mktemp("migrated") / "manta.db"
    with closing(store.Store(f"sqlite:///{template}")):
        migrate = store.migrate

    def copied(engine: sa.Engine) -> None:
        path = Path(engine.url.database or "")
        if engine.dialect.name == "sqlite" and not path.exists():
            copy = Path(shutil.copy(template, path.with_name(uuid.uuid4().hex)))
            try:
                os.link(copy, path)  # of threads that come at once one makes it
            except FileExistsError:
                migrate(engine)
            finally:
                copy.unlink()
        else:
            migrate(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "migrate", copied)
        yield


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with local_client(service.app) as client:
        yield client


@pytest.fixture
def body(toy_shards: dict[str, str]) -> dict[str, Any]:
    data = {"train": {"shards": toy_shards["train"]}}
    return {"name": "toy", "method": TOY_MAE, "model": TOY_MODEL, "data": data, "epochs": 1, "batch_size": 8}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.store.close()


@pytest.fixture(scope="session")
def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """For properties, which empty it themselves."""
    stage = Stage(tmp_path_factory.mktemp("hooks"))
    yield stage
    stage.store.close()


@pytest.fixture
def stage(shared_stage: Stage) -> Stage:
    shared_stage.empty()
    return shared_stage
