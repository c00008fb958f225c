"""kill -9 of each part of an installation in a burst of submissions: every accepted job is done, once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.embedded import Head
from tests.faults.installed import installation, postgres
from tests.faults.kills import HEAD, RECONCILER, SERVICE, of_postgres, on_own_cluster, ordeal
from tests.faults.table import KillRow
from tests.postgres import missing

pytestmark = pytest.mark.ray
Record = Callable[[KillRow], None]


def test_of_service_and_reconciler(cluster: Head, rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    with installation(tmp_path / "home", cluster) as installed:
        record_kill(ordeal(installed, [SERVICE, *RECONCILER], 12, rng))


def test_of_postgresql(cluster: Head, rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    if why := missing():
        pytest.skip(why)
    with postgres() as server, installation(tmp_path / "home", cluster, server.url) as installed:
        record_kill(ordeal(installed, [of_postgres(server)], 6, rng))


def test_of_the_head_of_ray(rng: random.Random, record_kill: Record, tmp_path: Path) -> None:
    record_kill(on_own_cluster([HEAD], tmp_path, 6, rng))
