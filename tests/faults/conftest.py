"""The seed of all faults, the job that they happen to, and the table at the end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.faults import EVERY, SEED, STEPS
from tests.faults.table import FAULT, Row, table
from tests.faults.trial import Weights, final_weights
from tests.toy import TOY_MAE, TOY_MODEL
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, run_local
from workloads.spec import JobSpec


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    rows = [
        value for report in reports if report.when == "call" for name, value in report.user_properties if name == FAULT
    ]
    if rows:
        terminalreporter.section(f"faults, FAULTS_SEED={SEED}")
        for line in table(rows):
            terminalreporter.write_line(line)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Of this test: the same for the same FAULTS_SEED, whichever tests run beside it."""
    return random.Random(f"{SEED}/{request.node.name}")


@pytest.fixture
def record_row(record_property: Callable[[str, object], None]) -> Callable[[Row], None]:
    return lambda row: record_property(FAULT, row)


@pytest.fixture(scope="session")
def job(toy_shards: dict[str, str]) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "faults",
            "method": TOY_MAE,
            "model": TOY_MODEL,
            "data": {"train": {"shards": toy_shards["train"]}},
            "steps": STEPS,
            "batch_size": 8,
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every_steps": EVERY},
        }
    )


@pytest.fixture(scope="session")
def two_workers(job: JobSpec) -> JobSpec:
    return JobSpec.model_validate(job.model_dump() | {"resources": {"workers": 2}})


@pytest.fixture(scope="session")
def uninterrupted(job: JobSpec, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The weights that the job ends with when nothing happens to it."""
    run = RunFolder(tmp_path_factory.mktemp("uninterrupted") / "run")
    assert run_local(job, run.path) == SUCCEEDED
    return final_weights(run)
