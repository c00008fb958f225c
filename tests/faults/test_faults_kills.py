"""kill -9 of the service and inside its reconciler's critical section, in a burst of submissions each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.embedded import Head
from tests.faults.installed import installation
from tests.faults.kills import RECONCILER, SERVICE, ordeal
from tests.faults.table import KillRow

pytestmark = pytest.mark.ray


def test_every_accepted_job_is_done_once(
    cluster: Head, rng: random.Random, record_kill: Callable[[KillRow], None], tmp_path: Path
) -> None:
    with installation(tmp_path / "home", cluster) as installed:
        record_kill(ordeal(installed, [SERVICE, *RECONCILER], 12, rng))
