"""What tests of routes share; a file with another service names its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.service.fakes import local_client
from tests.service.rest import Service
from tests.service.world import World
from tests.toy import TOY_MAE, TOY_MODEL


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
