"""`make soak`: of each method of the catalog a worker under Ray Train is killed, and the whole node of one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import embedded
from cluster.embedded import Head
from tests.faults.faults import EVERY
from tests.faults.ray_faults import NODE_CPUS, node_killed, uninterrupted_ranks, worker_killed
from tests.faults.table import Row
from tests.faults.trial import trial_of
from tests.toy_methods import toy_method_job
from workloads import catalog
from workloads.spec import JobSpec

STEPS = 200  # enough that the job still trains when the fault comes
pytestmark = [pytest.mark.ray, pytest.mark.soak]

Record = Callable[[Row], None]


def job_of(name: str, toy_shards: dict[str, str], **resources: int) -> JobSpec:
    of_two = {"resources": {"workers": 2, **resources}, "checkpoint": {"every_steps": EVERY}}
    return toy_method_job(toy_shards, name, epochs=None, steps=STEPS, **of_two)


@pytest.mark.parametrize("name", sorted(catalog.METHODS))
def test_a_killed_worker_of_each_method(
    name: str,
    cluster: Head,
    toy_shards: dict[str, str],
    toy_home: Path,
    rng: random.Random,
    record_row: Record,
    tmp_path: Path,
) -> None:
    spec = job_of(name, toy_shards)
    expected = uninterrupted_ranks(spec, tmp_path / "whole", home=toy_home)
    with trial_of(spec, tmp_path / "trial", embedded.environment(cluster)) as trial:
        trial.lend(toy_home)
        fault = replace(worker_killed(cluster), name="worker SIGKILL, a method each")
        record_row(fault.happens_to(trial, rng, expected))


@pytest.mark.parametrize("name", sorted(catalog.METHODS))
def test_a_killed_node_of_each_method(
    name: str,
    cluster: Head,
    toy_shards: dict[str, str],
    toy_home: Path,
    rng: random.Random,
    record_row: Record,
    tmp_path: Path,
) -> None:
    spec = job_of(name, toy_shards, cpus_per_worker=NODE_CPUS)
    expected = uninterrupted_ranks(spec, tmp_path / "whole", home=toy_home)
    environment = embedded.environment(cluster)
    with node_killed(cluster, tmp_path / "nodes") as fault, trial_of(spec, tmp_path / "trial", environment) as trial:
        trial.lend(toy_home)
        record_row(replace(fault, name="node SIGKILL, a method each").happens_to(trial, rng, expected))
