"""One process runs the job: each fault once, at a random moment."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.faults import FAULTS, Fault, s3_gone
from tests.faults.table import Row
from tests.faults.trial import Weights, trial_of
from tests.s3 import S3, on_s3
from workloads.spec import JobSpec


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_the_job_ends_with_the_weights_of_an_uninterrupted_run(
    fault: Fault,
    job: JobSpec,
    uninterrupted: Weights,
    rng: random.Random,
    record_row: Callable[[Row], None],
    tmp_path: Path,
) -> None:
    with trial_of(job, tmp_path / "trial") as trial:
        record_row(fault.happens_to(trial, rng, uninterrupted))


def test_a_store_of_data_and_mirror_that_goes_away_costs_no_step(
    job: JobSpec,
    uninterrupted: Weights,
    rng: random.Random,
    record_row: Callable[[Row], None],
    s3_server: S3,
    tmp_path: Path,
) -> None:
    with trial_of(on_s3(job, s3_server), tmp_path / "trial", s3_server.environment) as trial:
        record_row(s3_gone(s3_server, outage_s=1.0).happens_to(trial, rng, uninterrupted))
