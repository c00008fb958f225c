"""One Ray cluster for the whole run, started when the first test asks for it."""

from __future__ import annotations

import ast
import gc
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from cluster import embedded
from cluster.embedded import Head

os.environ.setdefault("FAULTS_SEED", str(time.time_ns() % 100_000))  # all processes of a run inherit it
settings.register_profile("manta", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # no test by the clock
settings.load_profile("manta")
os.environ.update(embedded.MODE)  # before any conftest below imports ray, which reads it once
gc.disable()  # nothing that is imported is garbage


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """The tests of a file share a process, and so do all that start Ray: one cluster, one installation at a time.

    Groups of xdist would say the same, but version 3.8 does not see them with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        marked = _marked_ray(self.config.rootpath / file)
        return "ray" if marked & {"pytestmark", test.partition("[")[0]} else file


@cache
def _marked_ray(file: Path) -> set[str]:
    """Names of the tests of a file that are marked `ray`; `pytestmark` when all are."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any("mark.ray" in ast.unparse(mark) for mark in node.decorator_list):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and "mark.ray" in ast.unparse(node.value):
            found |= {ast.unparse(target) for target in node.targets}
    return found


def pytest_collection_finish() -> None:
    """A million objects of modules need not be looked at whenever a test leaves garbage."""
    gc.freeze()
    gc.enable()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """An embedded head with 4 CPUs; this process is connected to it."""
    before = dict(os.environ)
    head = embedded.start(tmp_path_factory.mktemp("home"), num_cpus=4)
    try:
        embedded.connect(head.home)
        yield head
    finally:
        import ray

        ray.shutdown()
        embedded.stop(head)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data sets: MANTA_TEST_DATA, or `shared/data` beside the checkout."""
    named = os.environ.get("MANTA_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set MANTA_TEST_DATA to a folder of data sets")
    return folder
