"""Two workers under Ray Train, one of which dies, or its node: the weights of two ranks that nothing happened to."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import embedded
from cluster.doctor import listening
from cluster.embedded import Head
from tests.faults.ray_faults import node_killed, uninterrupted_ranks, worker_killed
from tests.faults.table import Row
from tests.faults.trial import trial_of
from workloads.spec import JobSpec

pytestmark = pytest.mark.ray


def test_a_killed_worker_changes_no_bit(
    cluster: Head, two_workers: JobSpec, rng: random.Random, record_row: Callable[[Row], None], tmp_path: Path
) -> None:
    expected = uninterrupted_ranks(two_workers, tmp_path / "ranks")
    open_to_all: list[tuple[str, str, int]] = []
    fault = worker_killed(cluster, look=lambda: open_to_all.extend(listening(cluster.pid)))
    with trial_of(two_workers, tmp_path / "trial", embedded.environment(cluster)) as trial:
        record_row(fault.happens_to(trial, rng, expected))
    assert open_to_all == []  # torch's store and gloo too are on loopback
    assert json.loads((trial.run.artifact / "manta.json").read_text())["job_id"] == "job"


def test_a_killed_node_changes_no_bit(
    cluster: Head, on_two_nodes: JobSpec, rng: random.Random, record_row: Callable[[Row], None], tmp_path: Path
) -> None:
    expected = uninterrupted_ranks(on_two_nodes, tmp_path / "ranks")
    environment = embedded.environment(cluster)
    with (
        node_killed(cluster, tmp_path / "nodes") as fault,
        trial_of(on_two_nodes, tmp_path / "trial", environment) as trial,
    ):
        record_row(fault.happens_to(trial, rng, expected))
