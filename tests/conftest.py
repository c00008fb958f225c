"""One Ray cluster for the whole run, started when the first test asks for it."""

from __future__ import annotations

import ast
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


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """The tests of a file share a process, and so do all that start Ray: one cluster, and beside it one installation.

    Groups of xdist would say the same, but version 3.8 does not see them with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        marked = _marked(self.config.rootpath / file)
        marks = marked.get("pytestmark", "") + marked.get(test.partition("[")[0], "")
        return next((group for group in ("installation", "ray") if f"mark.{group}" in marks), file)


@cache
def _marked(file: Path) -> dict[str, str]:
    """The marks of the tests of a file as they are written, by name; `pytestmark`: those of all."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = " ".join(map(ast.unparse, node.decorator_list))
        elif isinstance(node, ast.Assign):
            found |= {ast.unparse(target): ast.unparse(node.value) for target in node.targets}
    return found


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
