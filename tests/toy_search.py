"""A search of seconds."""

from __future__ import annotations

import random
from typing import Any

import pyarrow.parquet as pq

from workloads.record import RunFolder
from workloads.search.base import Search
from workloads.search.island import Island
from workloads.spec_search import SearchSpec
from workloads.winner import POPULATION

TOY_SEARCH: dict[str, Any] = {
    "name": "zen_nas",
    "initial": "cifar",
    "image_size": 8,
    "classes": 10,
    "batch_size": 2,
    "population": 12,
    "iterations": 120,
    "budget": {"parameters": 200_000, "layers": 10},
}

TOY_SPACE: dict[str, Any] = {
    "stem": 8, "first": 8, "widths": [8, 16], "strides": [1, 2], "relu_stages": 1, "min_depth": 1, "max_depth": 2,
    "expansions": [2, 3], "kernels": [3, 5], "se": [False], "last": 16, "features": 12,
}  # fmt: skip
"""Of BINAS: two stages of one or two blocks, each of four configurations."""


def toy_search(search: dict[str, Any] | None = None, **fields: Any) -> SearchSpec:
    """A spec with some fields, or some of its search, replaced."""
    return SearchSpec.model_validate({"name": "toy", "search": TOY_SEARCH | (search or {}), **fields})


def kept(run: RunFolder) -> list[dict[str, Any]]:
    """Rows of the artifact as one seed gives them: without what was measured at the end."""
    rows = pq.read_table(run.artifact / POPULATION).to_pylist()
    return [{name: value for name, value in row.items() if "latency_ms" not in name} for row in rows]


def in_any_order(island: Island, seed: int = 0, until: int | None = None) -> Search:
    """Scores in any order, a few at a time; to the end, or until so many are told."""
    order = random.Random(seed)
    held: list[tuple[int, str]] = []
    while not island.done and (until is None or island.told < until):
        held += island.take(order.randint(1, 9))
        order.shuffle(held)
        island.give({index: island.search.score(candidate, index) for index, candidate in held[:3]})
        held = held[3:]
    return island.search
