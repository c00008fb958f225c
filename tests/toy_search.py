"""A search of seconds."""

from __future__ import annotations

from typing import Any

from workloads.spec_search import SearchSpec

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


def toy_search(search: dict[str, Any] | None = None, **fields: Any) -> SearchSpec:
    """A spec with some fields, or some of its search, replaced."""
    return SearchSpec.model_validate({"name": "toy", "search": TOY_SEARCH | (search or {}), **fields})
