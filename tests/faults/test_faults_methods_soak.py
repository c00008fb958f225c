"""`make soak`: of each method of the catalog a worker under Ray Train is killed, and the whole node of one."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
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

STEPS = 200  # enough that the job still trains when the fault comes
pytestmark = [pytest.mark.ray, pytest.mark.soak]

Record = Callable[[Row], None]


@pytest.mark.parametrize("what", ["worker", "node"])
@pytest.mark.parametrize("name", sorted(catalog.METHODS))
def test_a_fault_of_each_method(
    name: str,
    what: str,
    cluster: Head,
    toy_shards: dict[str, str],
    toy_home: Path,
    rng: random.Random,
    record_row: Record,
    tmp_path: Path,
) -> None:
    killed = nullcontext(worker_killed(cluster)) if what == "worker" else node_killed(cluster, tmp_path / "nodes")
    of_two = {"workers": 2, "cpus_per_worker": 1 if what == "worker" else NODE_CPUS}
    changes = {"steps": STEPS, "resources": of_two, "checkpoint": {"every_steps": EVERY}}
    spec = toy_method_job(toy_shards, name, epochs=None, **changes)
    expected = uninterrupted_ranks(spec, tmp_path / "whole", home=toy_home)
    with killed as fault, trial_of(spec, tmp_path / "trial", embedded.environment(cluster)) as trial:
        trial.lend(toy_home)
        record_row(replace(fault, name=f"{fault.name}, a method each").happens_to(trial, rng, expected))
