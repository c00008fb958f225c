"""Hours of a small fleet in seconds: the real reconciler and database, a made-up Ray and clock."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.benchmarks.fleet import SIZES, simulate


def test_a_queue_runs_through_whatever_dies(tmp_path: Path) -> None:
    """In order, on nodes that are never given twice (which `simulate` asserts), until all have ended."""
    found = simulate(3, 6, tmp_path, rounds=70, every_s=300, dying=0.3)
    assert found.ended == 6


def test_nodes_are_busy_while_jobs_wait(tmp_path: Path) -> None:
    found = simulate(4, 24, tmp_path, rounds=60, every_s=60)
    assert found.busy > 0.95


@pytest.mark.parametrize(("nodes", "queued"), [(1, 4), (2, 4), (4, 4), (2, 8)])
def test_what_a_round_asks_database_and_home_for(tmp_path: Path, nodes: int, queued: int) -> None:
    """What the table in the README of `cluster/` has for 10, 100 and 1,000 nodes."""
    found = simulate(nodes, nodes + queued, tmp_path, rounds=4, dying=0.0)
    assert (found.statements, found.records) == (2 * nodes + 2, nodes)


def test_the_readme_has_those_numbers() -> None:
    readme = (Path(__file__).parents[2] / "cluster" / "README.md").read_text()
    for nodes in SIZES:
        assert re.search(rf"\| {nodes:,} \| 10,000 \| [^|]+ \| [^|]+ \| {2 * nodes + 2:,} \| {nodes:,} \|", readme)
