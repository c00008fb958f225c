"""Hours of a small fleet in seconds: the real reconciler and database, a made-up Ray and clock."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.fleet import simulate


def test_a_queue_runs_through_whatever_dies(tmp_path: Path) -> None:
    """In order, on nodes that are never given twice (which `simulate` asserts), until all have ended."""
    found = simulate(3, 6, tmp_path, rounds=70, every_s=300, dying=0.3)
    assert found.ended == 6


def test_nodes_are_busy_while_jobs_wait(tmp_path: Path) -> None:
    found = simulate(4, 24, tmp_path, rounds=60, every_s=60)
    assert found.busy > 0.95
