"""Zen-NAS (Lin et al. 2021, arXiv 2102.01063): the structure within a budget that can express most, untrained.

Evolution by `zen_space` on the Zen-Score of `zen_score`. A child has up to two other parts than its parent; while the
population is small, one other part than where the search starts. Where that is itself over budget, the search starts
from the smallest network with as many parts. Parameters, multiply-adds and layers are in the units of the released
code, as the published budgets are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from numpy.random import Generator
from pydantic import AfterValidator, Field
from torch import nn

from workloads.models.structure import (
    String,
    Structure,
    StructureError,
    flops,
    layers,
    parameters,
    parse,
    parse_network,
    text,
)
from workloads.search.base import Winner
from workloads.search.evolution import Evolution, EvolutionConfig
from workloads.search.latency_budget import NetworkLatency
from workloads.search.zen_score import zen_score
from workloads.search.zen_space import RELEASED, START, TYPES, Space, mutate, smallest


def _structure(string: str) -> str:
    if string in START:
        return START[string]
    if "(" not in string:
        raise StructureError(f"got {string[:60]!r}, expected a structure string or one of {', '.join(START)}")
    return text(parse_network(string))


class ZenNASConfig(EvolutionConfig):
    """`{name: zen_nas, initial: cifar, image_size: 32, classes: 10, budget: {parameters: 1000000, layers: 18}}`.

    Attributes:
        initial: the structure to start from: cifar, imagenet or imagenet-mobile as in the paper, or a string.
        space: server: full convolutions and bottlenecks; mobile: inverted bottlenecks.
        image_size: side of the images of noise too.
        types: of a part that is replaced: all equally likely, or as often as the released code happens to draw them.
        classes: of the classifier, which counts too.
        batch_size: of the noise.
        g: how far the second images are from the first.
        repeats: scores of a candidate, whose mean counts.
    """

    initial: Annotated[String, AfterValidator(_structure)] = Field(default="imagenet", validate_default=True)
    space: Space = "server"
    types: Literal["uniform", "released"] = "uniform"
    classes: int = Field(default=1000, ge=2)
    batch_size: int = Field(default=64, ge=2)
    g: float = Field(default=0.01, gt=0)
    repeats: int = Field(default=1, ge=1)

    def costs(self, structure: Structure) -> dict[str, float]:
        return {
            "parameters": parameters(structure, self.classes),
            "flops": flops(structure, self.classes, self.image_size),
            "layers": layers(structure),
        }

    def least(self) -> Mapping[str, float]:
        structures = smallest(parse(self.initial), self.space)  # of which one is no dearer than the initial one
        found = [self.costs(structure) for structure in structures]
        least = {name: min(costs[name] for costs in found) for name in found[0]}
        if self.budget.latency is not None and self.budget.latency.table is not None:
            latency = NetworkLatency(self.budget.latency, self.image_size)
            least["latency_ms"] = min(latency.of_structure(structure, self.classes) for structure in structures)
        return least


class ZenNAS(Evolution):
    """Candidates are structure strings."""

    Config = ZenNASConfig
    paper = "Zen-NAS, Lin et al. 2021, arXiv 2102.01063"
    config: ZenNASConfig

    @cached_property
    def starts(self) -> list[Structure]:
        """Where the search starts. Whether a network is fast enough comes out later: the smallest is one way in."""
        config, start = self.config, parse(self.config.initial)
        least = min(smallest(start, config.space), key=lambda structure: config.costs(structure)["flops"])
        if not config.budget.met(config.costs(start)):
            return [least]
        return [start] if config.budget.latency is None else [start, least]

    def smallest(self) -> list[str]:
        return [text(structure) for structure in smallest(parse(self.config.initial), self.config.space)]

    def first_child(self, random: Generator) -> str:
        start = self.starts[int(random.integers(len(self.starts)))]
        return self._mutated(start, 1, random)

    def child(self, parent: str, random: Generator) -> str:
        return self._mutated(parse(parent), 2, random)

    def _mutated(self, structure: Structure, times: int, random: Generator) -> str:
        types = TYPES if self.config.types == "uniform" else RELEASED
        return text(mutate(structure, times, self.config.space, random, types))

    def costs(self, candidate: str) -> dict[str, float]:
        return self.config.costs(parse(candidate))

    def latency_ms(self, latency: NetworkLatency, candidate: str) -> float:
        return latency.of_structure(parse(candidate), self.config.classes)

    def build(self, candidate: str) -> nn.Module:
        from workloads.models.zennet import ZenNet  # which needs timm: 1.7 s, and few searches build one

        return ZenNet(parse(candidate), num_classes=self.config.classes)

    def rate(self, candidate: str, index: int) -> float:
        config, structure, random = self.config, parse(candidate), self.torch_random(index)
        options: dict[str, Any] = {"size": config.image_size, "batch_size": config.batch_size, "g": config.g}
        options |= {"generator": random, "device": self.inputs.device}
        scores = [zen_score(structure, **options).score for _ in range(config.repeats)]
        return sum(scores) / len(scores)

    def winner(self) -> Winner:
        row = self.best()
        structure, size, blocks = parse(row["candidate"]), self.config.image_size, []
        for part in structure:
            size = -(-size // part.stride)
            label = part.type.removeprefix("Super").removesuffix("BNRELU")
            blocks.append(
                {"label": label, "channels": part.width, "size": size, "layers": part.layers, "stride": part.stride}
            )
        model = {"name": "zennet", "structure": row["candidate"], "image_size": self.config.image_size}
        return Winner(row["candidate"], model, row["score"], self.costs_of(row), blocks)
