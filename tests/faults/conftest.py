"""The seed of all faults, and the job that they happen to."""

from __future__ import annotations

import random

import pytest

from tests.faults.faults import EVERY, SEED, STEPS
from tests.faults.ray_faults import NODE_CPUS
from tests.faults.trial import Weights, final_weights
from tests.toy import TOY_MAE, TOY_MODEL
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, run_local
from workloads.spec import JobSpec


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Of this test: the same for the same FAULTS_SEED, whichever tests run beside it."""
    return random.Random(f"{SEED}/{request.node.name}")


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


@pytest.fixture(scope="session")
def on_two_nodes(job: JobSpec) -> JobSpec:
    """A worker fills a node; there are steps enough for a fault that has to find its node first."""
    changes = {"steps": 1000, "resources": {"workers": 2, "cpus_per_worker": NODE_CPUS}}
    return JobSpec.model_validate(job.model_dump() | changes)
