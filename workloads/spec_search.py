"""SearchSpec: the description of a job that searches an architecture. No torch in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from workloads.spec import BaseSpec, Named, Stream


class SearchSpec(BaseSpec):
    """`search: {name: zen_nas, ...}` in place of a method and a model.

    Attributes:
        search: a name of the catalog and the config of what it names.
        islands: populations that evolve beside each other, each with its share of the workers.
        migrate_every: candidates of an island, after which it takes over the best of its neighbour.
        data, init: of searches that measure trained networks.
        resources: `workers` processes score candidates.
    """

    search: Named
    data: dict[str, Stream] = {}
    islands: int = Field(default=1, ge=1)
    migrate_every: int = Field(default=500, ge=1)

    @property
    def about(self) -> tuple[str, str]:
        return "search", self.search.name

    @model_validator(mode="after")
    def _shared_out(self) -> Self:
        workers = self.resources.workers
        if not isinstance(workers, int):
            raise ValueError(f"got workers={list(workers)}, expected one number for a search; choose one")
        if workers % self.islands:
            raise ValueError(
                f"got {workers} workers for {self.islands} islands, expected a multiple; use "
                f"{max(1, workers // self.islands) * self.islands}"
            )
        return self

    def absolute(self, base: Path) -> Self:
        spec = super().absolute(base)
        return spec.model_copy(update={"search": Named.model_validate(_tables(spec.search.model_dump(), base))})


def _tables(config: Any, base: Path) -> Any:
    """Paths of latency tables, wherever a config has one."""
    if not isinstance(config, dict):
        return config
    return {
        key: str(base / value) if key == "table" and isinstance(value, str) else _tables(value, base)
        for key, value in config.items()
    }
