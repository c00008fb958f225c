"""A latency table: what the parts of a network cost on one device, measured once, so that networks need not be.

A network is the sum of its parts (`search.latency_ops`); each is looked up by what it is and interpolated over its
widths: log ms is linear in log channels between those that were measured. So a candidate costs microseconds, and a
search for a GPU runs on a machine without one. What the sum does not know: which maps are still in a cache (published
networks say by how much it is off as a whole), and tiles of a GPU that a width just misses.

One JSON file, written by `manta latency-table` (`search.latency_grid`).
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from workloads.search.latency import Precision
from workloads.search.latency_ops import Op, TableError


class LatencyTable(BaseModel):
    """What was measured.

    Attributes:
        on: `cpu` or `cuda`.
        device: its name.
        torch: version.
        size: side of the images; maps are that over powers of 2.
        batch_size: images at once.
        precision: of weights and maps.
        ms: family -> sizes, as `64,128` -> ms per image.
        checks: published network -> ms by the sum of its parts, and measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    on: Literal["cpu", "cuda"]
    device: str
    torch: str
    size: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    precision: Precision
    ms: dict[str, dict[str, float]]
    checks: dict[str, tuple[float, float]] = {}
    _grids: dict[str, tuple[dict[tuple[int, ...], float], list[list[int]]]] = PrivateAttr(default_factory=dict)
    _known: dict[Op, float] = PrivateAttr(default_factory=dict)

    @property
    def conditions(self) -> str:
        """In words."""
        return f"{self.device}, {self.precision}, batches of {self.batch_size}, images of {self.size} px"

    def of(self, op: Op) -> float:
        """Milliseconds per image of a part.

        Raises:
            TableError: the table does not cover it.
        """
        if op not in self._known:
            self._known[op] = self._interpolated(op)
        return self._known[op]

    @property
    def ratio(self) -> float:
        """Measured by added, the geometric mean over the networks of `checks`: a network's maps are rarely cached."""
        return math.exp(
            sum(math.log(measured / added) for added, measured in self.checks.values()) / len(self.checks or [1])
        )

    def predict(self, ops: Iterable[Op] | Mapping[Op, int]) -> float:
        """Milliseconds per image of a network of these parts; see `operations` and `of_structure`."""
        return self.ratio * self.added(ops)

    def added(self, ops: Iterable[Op] | Mapping[Op, int]) -> float:
        """The sum alone."""
        return sum(count * self.of(op) for op, count in Counter(ops).items())

    def _interpolated(self, op: Op) -> float:
        points, axes = self._grid(op.family)
        around = []  # by axis: the measured sizes below and above, and their weights
        for size, axis in zip(op.sizes, axes, strict=True):
            above = bisect_left(axis, size)
            if above == len(axis) or (above == 0 and axis[0] != size):
                self._refuse(op, f"{axis[0]} to {axis[-1]}" if axis else "nothing")
            if axis[above] == size:
                around.append([(size, 1.0)])
                continue
            low, high = axis[above - 1], axis[above]
            share = math.log(size / low) / math.log(high / low)
            around.append([(low, 1 - share), (high, share)])
        total = 0.0
        for corner in itertools.product(*around):
            sizes = tuple(size for size, _ in corner)
            if sizes not in points:
                self._refuse(op, f"no {' -> '.join(map(str, sizes))}, which was left out as too large")
            total += math.prod(weight for _, weight in corner) * math.log(points[sizes])
        return math.exp(total)

    def _grid(self, family: str) -> tuple[dict[tuple[int, ...], float], list[list[int]]]:
        if family not in self.ms:
            near = [name for name in self.ms if name.split(" at ")[0] == family.split(" at ")[0]]
            raise TableError(
                f"got a network with {family!r}, expected {', '.join(near) or ', '.join(self.ms)} in a table for "
                f"images of {self.size} px; measure it: `manta latency-table` with --size and --kernel"
            )
        if family not in self._grids:
            points = {tuple(map(int, key.split(","))): ms for key, ms in self.ms[family].items()}
            self._grids[family] = points, [sorted(set(axis)) for axis in zip(*points, strict=True)]
        return self._grids[family]

    def _refuse(self, op: Op, holds: str) -> None:
        raise TableError(
            f"got a network with {op}, where the table ({self.conditions}) has {holds}; "
            "measure it: `manta latency-table` with --width and --most-macs"
        )

    def write(self, file: Path) -> None:
        """In one piece, or not at all."""
        part = file.with_name(f".{file.name}.part")
        part.write_text(json.dumps(self.model_dump(), indent=1) + "\n")
        part.replace(file)

    @classmethod
    def read(cls, file: Path) -> LatencyTable:
        """Reads what `write` wrote.

        Raises:
            TableError: there is no such file, or it is no table.
        """
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise TableError(
                f"got no latency table at {file} ({error.strerror}); make one: manta latency-table"
            ) from error
        except ValidationError as error:
            problem = error.errors()[0]
            raise TableError(
                f"got {file}, whose {'.'.join(map(str, problem['loc'])) or 'text'} is no latency table's "
                f"({problem['msg']}); make one: manta latency-table"
            ) from error
