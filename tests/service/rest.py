"""A whole service in this process, over a fake Ray; the reconciler is turned by hand."""

from __future__ import annotations

from pathlib import Path

from service.app import build
from service.audit import Audit
from service.jobs import Jobs
from service.parts import Parts
from service.projects import Projects
from service.reconciler import Reconciler
from service.registry import Registry
from service.settings import Settings
from service.store import Store
from service.tokens import Tokens
from tests.service.fakes import FakeRay


class NoDeployments:
    def view(self, name: str) -> None:
        return None

    def reconcile(self) -> None:
        pass


class Service:
    """The app over a fake Ray; the reconciler is turned by hand."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home, reconcile_interval_s=3600)
        store, self.ray = Store(settings.database), FakeRay()
        registry = Registry(settings, store)
        reconciler = Reconciler(settings, store, self.ray, registry, lambda: None)  # type: ignore[arg-type]
        jobs = Jobs(settings, store, self.ray, registry, lambda: None)  # type: ignore[arg-type]
        people = Tokens(store), Projects(store), Audit(store)
        self.parts = Parts(settings, store, self.ray, registry, reconciler, jobs, NoDeployments(), *people)  # type: ignore[arg-type]
        self.app = build(settings, self.parts)
        self.runs = settings.runs
