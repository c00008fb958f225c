"""`make soak`: 100 jobs while each part of an installation is killed five times, again and again brought back."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import embedded
from tests.faults.installed import installation, postgres
from tests.faults.kills import HEAD, RECONCILER, SERVICE, Kill, of_postgres, ordeal
from tests.faults.table import KillRow

pytestmark = [pytest.mark.ray, pytest.mark.soak]

JOBS, KILLS = 100, 5
EPOCHS = 30  # of 0.1 s: as long as Ray takes to start a job, so that kills meet jobs at work too
Record = Callable[[KillRow], None]


def whole(kills: list[Kill], home: Path, rng: random.Random, database_url: str = "") -> KillRow:
    head = embedded.start(home / "cluster", num_cpus=4)
    with installation(home / "home", head, database_url) as installed:
        try:
            return ordeal(installed, kills, JOBS, rng, EPOCHS)
        finally:
            embedded.stop(installed.head)


def test_the_service(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    record_kill(whole([SERVICE] * KILLS, tmp_path, rng))


def test_the_reconciler_inside_its_critical_section(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    record_kill(whole([*RECONCILER, *rng.sample(RECONCILER, KILLS - len(RECONCILER))], tmp_path, rng))


def test_the_head_of_ray(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    record_kill(whole([HEAD] * KILLS, tmp_path, rng))


def test_postgresql(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'manta[postgres]'")
    if shutil.which("initdb") is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgres() as server:
        record_kill(whole([of_postgres(server)] * KILLS, tmp_path, rng, server.url))
