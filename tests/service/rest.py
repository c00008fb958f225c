"""A whole service in this process, over a fake Ray; the reconciler is turned by hand."""

from __future__ import annotations

from pathlib import Path

from service.app import build
from service.parts import build_parts
from service.settings import Settings
from tests.service.fakes import FakeRay, Inline


class NoDeployments:
    def view(self, name: str) -> None:
        return None

    def reconcile(self) -> None:
        pass


class Service:
    """The app over a fake Ray; the reconciler is turned by hand."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home, reconcile_interval_s=3600)
        self.ray = FakeRay()
        self.parts = build_parts(
            settings,
            ray=self.ray,  # type: ignore[arg-type]
            deployments=NoDeployments(),  # type: ignore[arg-type]
            wake=lambda: None,
            checkers=Inline(),
        )
        self.app = build(settings, self.parts)
        self.runs = settings.runs
