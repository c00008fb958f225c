"""MAE-DET (Sun et al. 2022, arXiv 2111.13336): the backbone within a budget whose maps have most entropy, untrained.

Without BatchNorms and shortcuts, with weights and images from N(0, 1), each convolution multiplies the variance by the
number of values that it sums; the entropy of a map is the logarithm of that, up to constants. As in the released code

    H_s = log C_s + sum over the convolutions up to the end of stage s, from the images on, of log sqrt(C_in k^2)
    Z = sum over stages of a_s H_s

with C_s the channels of the stage, and most weight a_s on the deepest of the maps that a detector sees; for
classification only the last counts, (0, 0, 0, 0, 1). Nothing is computed but this formula. Sizes of maps and shortcuts
do not count; every layer adds to it, so a bound on layers is a must.

Evolution by `mae_det_space` starts with the initial structure, or where that is over budget, with the smallest network
of its blocks. Parameters are those of the backbone, layers its convolutions without those of shortcuts, FLOPs in
the units of the released code, as the published budgets are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import torch
from numpy.random import Generator
from pydantic import BeforeValidator, Field, model_validator

from workloads.models.maedet import MAEDet
from workloads.models.maedet_structure import Structure, flops, layers, parameters, parse, plain, stages, strides, text
from workloads.models.structure import MOST_CHANNELS, Channels, StructureError
from workloads.search.base import Winner
from workloads.search.evolution import Evolution, EvolutionConfig
from workloads.search.latency_budget import NetworkLatency
from workloads.search.latency_ops import of_branches
from workloads.search.mae_det_space import START, Space

Weight = Annotated[float, Field(ge=0)]


def stage_entropies(structure: Structure) -> list[float]:
    """H_s of each stage s."""
    h, found, ends = 0.0, [], set(stages(structure))
    for i, block in enumerate(structure):
        for branch, count in block.parts():
            h += count * sum(math.log(conv.width_in * conv.kernel**2) / 2 for conv in branch.convs)
        if i in ends:
            found.append(math.log(block.width) + h)
    return found


def entropy_score(structure: Structure, weights: Sequence[float]) -> float:
    """Z for weights a_s, one for each stage."""
    return math.fsum(a * H for a, H in zip(weights, stage_entropies(structure), strict=True))


def latency_ms(latency: NetworkLatency, structure: Structure) -> float:
    """By a table in a millisecond, as nothing is built, or measured.

    Raises:
        TableError: the table does not cover it.
    """
    if latency.table is not None:
        branches = (branch for block in structure for branch, count in block.parts() for _ in range(count))
        return latency.table.predict(of_branches(branches, latency.size, pools=True))
    with torch.device("meta"):
        network = MAEDet(structure)
    return latency(network)


def _initial(value: Any) -> Structure:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        if value not in START:
            raise StructureError(f"got {value[:60]!r}, expected a list of blocks or one of {', '.join(START)}")
        return START[value]
    return parse(value)


class MAEDETConfig(EvolutionConfig):
    """`{name: mae_det, initial: k1kxk1, budget: {flops: 18800000000, layers: 91}}`.

    Attributes:
        initial: the structure to start from: k1kxk1 as in the paper, k1kx as for DAMO-YOLO, or a list of blocks.
        stage_weights: a_s of the stages, that of the images' side first; DAMO-YOLO's last is 16.
        max_width: most channels of a block.
        max_stem: most channels of the stem.
        width_ranges: of blocks of K1KX and KXKX, least and most channels for each block of the structure, or null;
            DAMO-YOLO's are null, null, [64, 128], null, [128, 256], [256, 512].
    """

    iterations: int = Field(default=100000, ge=1)
    initial: Annotated[Structure, BeforeValidator(_initial, json_schema_input_type=str | Structure)] = Field(
        default="k1kxk1", validate_default=True
    )
    image_size: int = Field(default=480, ge=8)
    stage_weights: tuple[Weight, ...] = (0, 0, 1, 1, 6)
    max_width: int = Field(default=2048, ge=8, le=MOST_CHANNELS)
    max_stem: int = Field(default=32, ge=8, le=MOST_CHANNELS)
    width_ranges: tuple[tuple[Channels, Channels] | None, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> MAEDETConfig:
        if len(self.stage_weights) != (count := len(stages(self.initial))) or not any(self.stage_weights):
            raise ValueError(
                f"got stage_weights {list(self.stage_weights)} for a structure of {count} stages, expected a weight "
                "for each, not all 0; a stage ends where the next block has stride 2"
            )
        if self.budget.layers is None:
            raise ValueError(
                "got a budget without layers, expected a bound: each layer raises the score; the paper has layers: 91"
            )
        if self.width_ranges is not None:
            self._check(self.width_ranges)
        return self

    def _check(self, ranges: Sequence[tuple[int, int] | None]) -> None:
        if len(ranges) != len(self.initial):
            raise ValueError(
                f"got {len(ranges)} width_ranges for {len(self.initial)} blocks, expected one each, or null"
            )
        for i, (block, given) in enumerate(zip(self.initial, ranges, strict=True), 1):
            if given is not None and (block.kind not in ("ResK1KX", "ResKXKX") or given[0] > given[1]):
                raise ValueError(
                    f"got width_ranges {list(given)} for block {i}, {block.kind}, expected [least, most] for a "
                    "ResK1KX or ResKXKX; write null for others"
                )

    @property
    def space(self) -> Space:
        assert self.budget.layers is not None
        return Space(self.image_size, self.budget.layers, self.max_width, self.max_stem, self.width_ranges)

    def costs(self, structure: Structure) -> dict[str, float]:
        return {
            "parameters": parameters(structure),
            "flops": flops(structure, self.image_size),
            "layers": layers(structure),
        }

    def least(self) -> Mapping[str, float]:
        structures = [self.initial, self.space.smallest(self.initial)]
        found = [self.costs(structure) for structure in structures]
        least = {name: min(costs[name] for costs in found) for name in found[0]}
        if self.budget.latency is not None and self.budget.latency.table is not None:
            latency = NetworkLatency(self.budget.latency, self.image_size)
            least["latency_ms"] = min(latency_ms(latency, structure) for structure in structures)
        return least


class MAEDET(Evolution):
    """Candidates are structures as JSON."""

    Config = MAEDETConfig
    paper = "MAE-DET, Sun et al. 2022, arXiv 2111.13336"
    config: MAEDETConfig
    few = 0  # what the search starts with are members

    @cached_property
    def starts(self) -> list[Structure]:
        """What is asked for first. Whether a network is fast enough comes out later: the smallest is one way in."""
        config, smallest = self.config, self.config.space.smallest(self.config.initial)
        if not config.budget.met(config.costs(config.initial)):
            return [smallest]
        return [config.initial] if config.budget.latency is None else [config.initial, smallest]

    def smallest(self) -> list[str]:
        return [text(self.config.space.smallest(self.config.initial))]

    def turn(self, number: int, random: Generator) -> str:
        return text(self.starts[number]) if number < len(self.starts) else super().turn(number, random)

    def first_child(self, random: Generator) -> str:
        return text(self.config.space.mutate(self.starts[0], random))

    def child(self, parent: str, random: Generator) -> str:
        return text(self.config.space.mutate(parse(parent), random))

    def costs(self, candidate: str) -> dict[str, float]:
        return self.config.costs(parse(candidate))

    def latency_ms(self, latency: NetworkLatency, candidate: str) -> float:
        return latency_ms(latency, parse(candidate))

    def build(self, candidate: str) -> MAEDet:
        return MAEDet(parse(candidate))

    def rate(self, candidate: str, index: int) -> float:
        return entropy_score(parse(candidate), self.config.stage_weights)

    def winner(self) -> Winner:
        row = self.best()
        structure, size = parse(row["candidate"]), self.config.image_size
        blocks = [
            {
                "label": block.kind.replace("KX", f"K{block.kernel}").removesuffix("BNRELU"),
                "channels": block.width,
                "size": -(-size // stride),
                "layers": block.layers or 1,
                "stride": block.stride,
            }
            for block, stride in zip(structure, strides(structure), strict=True)
        ]
        model = {"name": "maedet", "structure": plain(structure), "image_size": size}
        return Winner(row["candidate"], model, row["score"], self.costs_of(row), blocks)
