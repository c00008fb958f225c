"""`pytest -m soak tests/cluster/test_driver_soak.py`: a driver of a job on workers fits into the head of the chart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.driver import measure


@pytest.mark.ray
@pytest.mark.soak
def test_ten_drivers_fit_into_the_head_of_the_chart(tmp_path: Path) -> None:
    found = measure(tmp_path, settle_s=5, look_s=20)
    assert 0 < found.own_bytes < found.resident_bytes < 0.5 * 2**30
    assert 0 < found.cores < 0.1
