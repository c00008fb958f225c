"""`make soak`: 100 jobs while each part of an installation is killed five times, again and again brought back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.installed import postgres
from tests.faults.kills import HEAD, RECONCILER, SERVICE, of_postgres, on_own_cluster
from tests.faults.table import KillRow
from tests.postgres import missing

pytestmark = [pytest.mark.ray, pytest.mark.soak]

JOBS, KILLS = 100, 5
Record = Callable[[KillRow], None]


def test_the_service(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    record_kill(on_own_cluster([SERVICE] * KILLS, tmp_path, JOBS, rng))


def test_the_reconciler_inside_its_critical_section(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    kills = [*RECONCILER, *rng.sample(RECONCILER, KILLS - len(RECONCILER))]
    record_kill(on_own_cluster(kills, tmp_path, JOBS, rng))


def test_the_head_of_ray(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    record_kill(on_own_cluster([HEAD] * KILLS, tmp_path, JOBS, rng))


def test_postgresql(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    if why := missing():
        pytest.skip(why)
    with postgres() as server:
        record_kill(on_own_cluster([of_postgres(server)] * KILLS, tmp_path, JOBS, rng, server.url))
