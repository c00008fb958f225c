"""`make soak`: every fault, again and again, at random moments, for SOAK_MINUTES; what else it runs is not bounded.

A round that fails is told with its number, and the soak goes on; the same FAULTS_SEED makes the same rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import embedded
from cluster.embedded import Head
from tests.faults.faults import FAULTS, SEED, s3_gone
from tests.faults.ray_faults import (
    controller_killed,
    node_killed,
    replica_killed,
    uninterrupted_ranks,
    worker_killed,
)
from tests.faults.table import Row
from tests.faults.trial import Weights, final_weights, trial_of
from tests.s3 import S3, on_s3
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, run_local
from workloads.spec import JobSpec

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
OUTAGE_S = 20.0  # of the S3 server; the suite has a second of it
pytestmark = pytest.mark.soak

Record = Callable[[Row], None]


def soak(name: str, share: float, turn: Callable[[int, random.Random, Path], Row], record: Record, home: Path) -> None:
    """Takes turns for its share of the time, at least one.

    Args:
        name: in what is told.
        share: of SOAK_MINUTES.
        turn: makes the turn of this number, in a new folder.
        record: gets its row.
        home: for the folders; that of a failure stays.
    """
    end = time.monotonic() + 60 * MINUTES * share
    failures = []
    for n in itertools.count():
        try:
            record(turn(n, random.Random(f"{SEED}/{name}/{n}"), home / str(n)))
            shutil.rmtree(home / str(n), ignore_errors=True)
        except Exception as error:
            failures.append(f"round {n} in {home / str(n)}: {type(error).__name__}: {error}")
            record(Row(f"{name}: failed rounds", 1, False, 0, False))
        if time.monotonic() > end:
            break
    assert not failures, "\n".join(failures)


def test_soak_of_one_process(
    job: JobSpec, uninterrupted: Weights, record_row: Record, s3_server: S3, tmp_path: Path
) -> None:
    def turn(n: int, rng: random.Random, folder: Path) -> Row:
        if n % (len(FAULTS) + 1) < len(FAULTS):
            with trial_of(job, folder) as trial:
                return FAULTS[n % (len(FAULTS) + 1)].happens_to(trial, rng, uninterrupted)
        with trial_of(on_s3(job, s3_server), folder, s3_server.environment) as trial:
            return s3_gone(s3_server, OUTAGE_S).happens_to(trial, rng, uninterrupted)

    soak("one process", 0.4, turn, record_row, tmp_path)


@contextlib.contextmanager
def installation(home: Path) -> Iterator[Head]:
    """Started by its command: Ray keeps the first token that this process uses, and the cluster has another."""
    command = [sys.executable, "-m", "service.cli", "--home", str(home)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_"))}
    subprocess.run([*command, "up", "--cpus", "3"], env=environment, check=True, timeout=180)
    try:
        head = embedded.read(home)
        assert head is not None
        yield head
    finally:
        subprocess.run([*command, "down"], env=environment, check=True, timeout=180)


def test_soak_of_the_service(job: JobSpec, record_row: Record, tmp_path: Path) -> None:
    spec = job.model_copy(update={"steps": 1000, "log_steps": 1})
    assert run_local(spec, tmp_path / "whole") == SUCCEEDED
    expected = final_weights(RunFolder(tmp_path / "whole"))
    with installation(tmp_path / "home") as head:
        soak("service", 0.2, lambda _, rng, __: replica_killed(head, spec, rng, expected), record_row, tmp_path)


@pytest.mark.ray
def test_soak_of_workers_and_nodes(
    cluster: Head, two_workers: JobSpec, on_two_nodes: JobSpec, record_row: Record, tmp_path: Path
) -> None:
    jobs = {"one": two_workers, "two": on_two_nodes}
    expected = [uninterrupted_ranks(job, tmp_path / nodes) for nodes, job in jobs.items()]
    environment = embedded.environment(cluster)

    def turn(n: int, rng: random.Random, folder: Path) -> Row:
        if n % 3:
            fault = controller_killed(cluster) if n % 3 == 1 else worker_killed(cluster, times=rng.randrange(1, 4))
            with trial_of(two_workers, folder, environment) as trial:
                return fault.happens_to(trial, rng, expected[0])
        with (
            node_killed(cluster, folder / "nodes") as fault,
            trial_of(on_two_nodes, folder / "trial", environment) as trial,
        ):
            return fault.happens_to(trial, rng, expected[1])

    soak("workers and nodes", 0.4, turn, record_row, tmp_path)
