"""How near a slice that was trained again came to the run: its curve, and its weights at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workloads.checkpoint_folder import Seal
from workloads.checkpoint_newest import in_parts

COMPARED = ("loss", "grad_norm", "lr")  # of a point; the rest of it is of the machine, or of the moment
TOLERANCE = 1e-4  # relative, where sums may have been made in another order


@dataclass(frozen=True)
class Curves:
    """How two curves differ.

    Attributes:
        points: that were compared.
        first_difference: the first value that is not bit-equal: step, name, run, replay; None: all are.
        largest: relative difference of each name over all points; 1 where only one side has a number.
    """

    points: int
    first_difference: dict[str, Any] | None
    largest: dict[str, float]


@dataclass(frozen=True)
class Weights:
    """How two sets of weights differ.

    Attributes:
        tensor: where they differ most, None where they are bit-equal.
        difference: the largest, absolute; None where the tensors of one side are not those of the other.
    """

    tensor: str | None = None
    difference: float | None = 0.0


@dataclass(frozen=True)
class Report:
    """What a replay found.

    Attributes:
        equal: whether all is as near as it was expected to be. Weights count only where bits are expected: AdamW makes
            steps of the learning rate even of gradients that are nothing but rounding (the bias of attention's keys),
            and statistics of BatchNorm are those of micro-batches.
        expected: "bit-equal", or within which tolerance and why.
        trained: the steps, in words.
        curve: against that of the run.
        weights: against the checkpoint of the run at the end; None where it keeps none.
        environment: how it differs, between attempts of the run and to this process; [] where it does not.
        notes: what was passed over.
    """

    equal: bool
    expected: str
    trained: str
    curve: Curves
    weights: Weights | None
    environment: list[str]
    notes: list[str]

    def rows(self) -> list[tuple[str, str]]:
        """(field, value) for a table."""
        at = self.curve.first_difference
        curve = "bit-equal" if self.curve.points else "nothing to compare"
        if at is not None:
            curve = f"differs first at step {at['step']}: {at['name']} was {at['run']}, is {at['replay']}"
        return [
            ("result", "equal" if self.equal else "NOT equal"),
            ("expected", self.expected),
            ("trained", self.trained),
            ("points compared", str(self.curve.points)),
            ("curve", curve),
            *((f"{name} differs by", f"{value:.3g} relative") for name, value in self.curve.largest.items() if value),
            ("weights", _words(self.weights)),
            *(("environment", line) for line in self.environment or ["the same"]),
            *(("note", line) for line in self.notes),
        ]


def _words(weights: Weights | None) -> str:
    if weights is None:
        return "no checkpoint at the end of the slice is kept"
    if weights.tensor is None:
        return "bit-equal"
    if weights.difference is None:
        return f"{weights.tensor} is there on one side only, or in another shape"
    return f"differ by up to {weights.difference:.3g}, in {weights.tensor}"


def compare_curves(run: Mapping[int, dict[str, Any]], replayed: Mapping[int, dict[str, Any]]) -> Curves:
    """Compares each point of `run`, by step in order, with that of the replay."""
    first: dict[str, Any] | None = None
    largest = dict.fromkeys(COMPARED, 0.0)
    for step, point in run.items():
        for name in COMPARED:
            a, b = point.get(name), replayed[step].get(name)
            if a != b and first is None:
                first = {"step": step, "name": name, "run": a, "replay": b}
            largest[name] = max(largest[name], _relative(a, b))
    return Curves(len(run), first, largest)


def _relative(a: float | None, b: float | None) -> float:
    if a == b:
        return 0.0
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return 1.0
    return abs(a - b) / max(abs(a), abs(b))


def compare_weights(run: dict[str, Tensor], replayed: dict[str, Tensor]) -> Weights:
    worst = Weights()
    for name in sorted({*run, *replayed}):
        a, b = run.get(name), replayed.get(name)
        if a is None or b is None or a.shape != b.shape:
            return Weights(name, None)
        if not torch.equal(a, b):
            difference = (a.double() - b.double()).abs().max().item()
            if worst.tensor is None or difference > (worst.difference or 0.0):
                worst = Weights(name, difference)
    return worst


def read_weights(folder: Path, seal: Seal) -> dict[str, Tensor]:
    """The tensors of the method in a checkpoint of any kind, on the CPU."""
    state: dict[str, Any]
    if in_parts(seal):
        from workloads.checkpoint_sharded import read

        state = read(folder / seal.name, nn.Module(), None)  # a module that shares nothing out gets all of it
    else:
        state = torch.load(folder / seal.name, map_location="cpu", weights_only=True)
    return dict(state["method"])
