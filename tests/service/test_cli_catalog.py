"""What a job may name, on the command line: as the service answers it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from service import cli
from service.client import Client
from workloads import catalog


@pytest.fixture
def manta(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`manta ...` against the service of the test."""
    monkeypatch.setenv("MANTA_URL", "http://manta")
    monkeypatch.setattr(Client, "_call", lambda _, method, path, **__: client.request(method, path).json())
    return lambda *words: CliRunner().invoke(cli.app, words).stdout


def test_searches_are_listed_with_paper_and_schema(manta: Any) -> None:
    header, *lines = manta("searches").splitlines()
    assert header == "name\tpaper\tsettings"
    rows = {name: (paper, settings) for name, paper, settings in (line.split("\t") for line in lines)}
    assert [*rows] == sorted(catalog.SEARCHES)
    for name, (paper, settings) in rows.items():
        cls = catalog.load("search", name)
        assert paper == cls.paper and settings.split(", ") == [*cls.Config.model_fields]
    listed = json.loads(manta("searches", "--json"))
    assert [(one["name"], one["schema"]) for one in listed] == [
        (name, catalog.load("search", name).Config.model_json_schema()) for name in rows
    ]
    assert json.loads(manta("searches", "zen_nas")) == listed[-1]


def test_methods_are_listed_with_their_papers(manta: Any) -> None:
    header, *lines = manta("methods").splitlines()
    assert header == "name\tpaper" and [line.split("\t")[0] for line in lines] == sorted(catalog.METHODS)
    assert json.loads(manta("methods", "mae"))["schema"] == catalog.load("method", "mae").Config.model_json_schema()
