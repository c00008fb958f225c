"""The page of papers says something of each method, once, and names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import workloads
from workloads import catalog

FOLDER = Path(workloads.__file__).parent
ROWS = [line for line in (FOLDER / "PAPERS.md").read_text().splitlines() if line.startswith("| ")][1:]


def names(cell: str) -> list[str]:
    """`a/{b,c}.py`, `d.py` -> a/b.py, a/c.py, d.py."""
    found = []
    for name in re.findall(r"`([^`]+)`", cell):
        head, brace, rest = name.partition("{")
        inner, _, tail = rest.partition("}")
        found += [head + one + tail for one in inner.split(",")] if brace else [name]
    return found


@pytest.mark.parametrize("method", sorted(set(catalog.METHODS) - {"fine_tune", "linear_probe"}))
def test_each_method_has_one_row(method: str) -> None:
    file = catalog.METHODS[method].partition(":")[0].removeprefix("workloads.").replace(".", "/") + ".py"
    assert sum(file in names(row.split("|")[2]) for row in ROWS) == 1


def test_what_the_rows_name_exists() -> None:
    for row in ROWS[1:]:
        _, paper, files, recipes, got, published, _ = row.split("|")
        assert paper.strip() and got.strip() and published.strip()
        missing = [name for name in names(files) + names(recipes) if not (FOLDER / name).is_file()]
        assert not missing, paper
