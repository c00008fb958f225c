"""A latency budget of a search: so many ms per image, by measurement or by a table.

A worker whose device it names measures; without that device the budget needs a table that was measured on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from workloads.models.structure import Structure
from workloads.search.latency import Precision, expect_precision, measure_all
from workloads.search.latency_ops import TableError, of_structure, operations
from workloads.search.latency_table import LatencyTable


class LatencyBudget(BaseModel):
    """`{ms: 0.34, device: cuda}`, or `{ms: 0.34, device: cuda, table: v100.json}` on a machine without a GPU.

    Attributes:
        ms: per image, at most.
        device: that it is about.
        batch_size: of the images that go through a network at once.
        precision: None: fp16 on a GPU, fp32 on a CPU.
        table: file that `manta latency-table` wrote; None: networks are measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ms: float = Field(gt=0, allow_inf_nan=False)
    device: Literal["cpu", "cuda"] = "cpu"
    batch_size: int = Field(default=64, ge=1, le=65_536)
    precision: Precision | None = None
    table: str | None = None

    @property
    def resolved_precision(self) -> Precision:
        return self.precision or ("fp16" if self.device == "cuda" else "fp32")

    def problems(self, device: str, size: int) -> list[str]:
        """What a job should be refused for.

        Args:
            device: `cpu` or `cuda`: what its workers have.
            size: side of the images.
        """
        try:
            expect_precision(self.resolved_precision, torch.device(self.device))
            self.read_table(size)
        except ValueError as error:
            return [str(error)]
        if self.table is None and self.device == "cuda" and device != "cuda":
            return [
                "got a latency budget of cuda for workers without GPUs, expected resources.gpus_per_worker: 1, or a "
                "table; on a machine with that GPU run `manta latency-table --device cuda`, and name its file in table"
            ]
        return []

    def read_table(self, size: int) -> LatencyTable | None:
        """The table, if there is one.

        Raises:
            TableError: it cannot be read, or says nothing of this budget.
        """
        if self.table is None:
            return None
        table = LatencyTable.read(Path(self.table))
        got = (table.on, table.batch_size, table.precision, table.size)
        expected = (self.device, self.batch_size, self.resolved_precision, size)
        if got != expected:
            raise TableError(
                f"got table {self.table} of (device, batch_size, precision, size) {got}, expected {expected}; "
                "change the budget, or measure another one"
            )
        return table


class NetworkLatency:
    """What answers for networks: ms per image."""

    def __init__(self, budget: LatencyBudget, size: int) -> None:
        """Reads the table, if there is one.

        Args:
            budget: says where and how.
            size: side of the images.
        """
        self.budget, self.size, self.table = budget, size, budget.read_table(size)

    def __call__(self, network: nn.Module) -> float:
        """Of any network of images; one on the meta device will do.

        Raises:
            TableError: the table does not cover it.
        """
        return self.of_all([network])[0]

    def of_all(self, networks: Sequence[nn.Module]) -> list[float]:
        """Of several, which are timed in turns: on a busy device too their quotients say something.

        Raises:
            TableError: the table does not cover one.
        """
        if self.table is not None:
            return [self.table.predict(operations(network, self.size)) for network in networks]
        return measure_all(
            networks,
            size=self.size,
            batch_size=self.budget.batch_size,
            precision=self.budget.resolved_precision,
            device=self.budget.device,
        )

    def of_structure(self, structure: Structure, classes: int = 0) -> float:
        """Of a structure string of Zen-NAS; by a table that is half a millisecond, as nothing is built.

        Raises:
            TableError: the table does not cover it.
        """
        if self.table is not None:
            return self.table.predict(of_structure(structure, self.size, classes))
        from workloads.models.zennet import ZenNet  # which needs timm: 1.7 s, and most searches have no such budget

        with torch.device("meta"):
            return self(ZenNet(structure, num_classes=classes))
