"""A driver of each method of the catalog is killed at a random moment."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.faults import Fault
from tests.faults.table import Row
from tests.faults.trial import Trial, final_weights, trial_of
from tests.toy_methods import toy_method_job
from workloads import catalog
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, run_local

STEPS, EVERY = 24, 4


def kill_driver(trial: Trial, rng: random.Random) -> int:
    driver = trial.start()
    trial.after(rng.randrange(1, STEPS // 2), rng)
    trial.kill(driver)
    return 1


@pytest.mark.parametrize("name", sorted(catalog.METHODS))
def test_a_killed_driver_of_each_method(
    name: str,
    toy_shards: dict[str, str],
    toy_home: Path,
    rng: random.Random,
    record_row: Callable[[Row], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = toy_method_job(toy_shards, name, epochs=None, steps=STEPS, checkpoint={"every_steps": EVERY})
    monkeypatch.setenv("MANTA_HOME", str(toy_home))
    whole = RunFolder(tmp_path / "whole")
    assert run_local(spec, whole.path) == SUCCEEDED
    with trial_of(spec, tmp_path / "trial") as trial:
        trial.lend(toy_home)
        fault = Fault("driver SIGKILL, a method each", kill_driver, may_lose=2 * EVERY)
        record_row(fault.happens_to(trial, rng, final_weights(whole)))
