"""Several front ends, each with a Serve of its own, over one table of deployments."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service import deployments
from service.deployments import Deployments
from service.errors import NotDeployed, Unavailable
from service.registry import Registry
from service.settings import Settings
from service.store import ModelVersion, Store
from tests.service.test_deployments import FakeServe, overview

APP = "model-digits"


class Fronts:
    """Two of them, one database, two clusters."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home)
        self.store = Store(settings.database)
        with self.store.session() as session:
            for version in (1, 2):
                row = ModelVersion(name="digits", version=version, kind="x", job_id=f"j{version}", source="a", card={})
                session.add(row)
        self.serves = FakeServe(), FakeServe()
        registry = Registry(settings, self.store)
        self.one, self.two = (Deployments(settings, self.store, registry, serve) for serve in self.serves)

    def round(self) -> None:
        self.one.reconcile()
        self.two.reconcile()

    def run(self) -> None:
        """Both serve what they were asked for."""
        self.round()
        for serve in self.serves:
            serve.apps[APP] = overview("RUNNING")
        self.round()


@pytest.fixture
def fronts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fronts]:
    monkeypatch.setattr(deployments, "application", lambda *arguments, **_: arguments[-1])
    fronts = Fronts(tmp_path)
    yield fronts
    fronts.store.close()


def test_what_one_undeploys_ends_on_both_with_the_next_round(fronts: Fronts) -> None:
    fronts.one.deploy("digits")
    fronts.run()
    assert asyncio.run(fronts.two.handle("digits"))
    fronts.one.undeploy("digits")
    fronts.round()
    assert [list(serve.apps) for serve in fronts.serves] == [["api"], ["api"]]
    with pytest.raises(NotDeployed):
        asyncio.run(fronts.two.handle("digits"))


def test_nobody_is_answered_by_what_was_undeployed_while_serve_is_away(fronts: Fronts) -> None:
    fronts.one.deploy("digits")
    fronts.run()
    asyncio.run(fronts.two.handle("digits"))
    fronts.one.undeploy("digits")
    fronts.serves[1].away = True
    with pytest.raises(Unavailable):
        fronts.two.reconcile()
    with pytest.raises(NotDeployed):
        asyncio.run(fronts.two.handle("digits"))
    fronts.serves[1].away = False
    fronts.round()
    assert list(fronts.serves[1].apps) == ["api"]


def test_one_that_restarted_finds_what_nobody_wants_in_its_time(fronts: Fronts, monkeypatch: Any) -> None:
    fronts.round()
    fronts.serves[1].apps[APP] = overview("RUNNING")  # an answer of Serve that came late
    fronts.round()
    assert APP in fronts.serves[1].apps
    monkeypatch.setattr(fronts.two, "_look_at", 0.0)  # CALM_S later
    fronts.round()
    assert APP not in fronts.serves[1].apps


def test_a_version_that_came_while_serve_was_away_is_served_when_it_is_back(fronts: Fronts) -> None:
    fronts.one.deploy("digits", 1)
    fronts.run()
    fronts.serves[1].away = True
    fronts.one.deploy("digits", 2)
    fronts.serves[0].apps[APP] = overview("RUNNING")
    fronts.one.reconcile()
    row = fronts.store.get_deployment("digits")
    assert row is not None and (row.version, row.state) == (2, "RUNNING")
    fronts.serves[1].away = False
    fronts.two._look_at = 0.0  # CALM_S later
    fronts.round()
    assert fronts.serves[1].references == ["digits@1", "digits@2"]
    assert fronts.serves[0].references == ["digits@1", "digits@2"]
    fronts.run()
    row = fronts.store.get_deployment("digits")
    assert row is not None and row.state == "RUNNING" and len(fronts.serves[1].references) == 2
