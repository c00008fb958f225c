"""The space of BINAS (Nayman et al. 2022, arXiv 2110.12399), which is that of HardCoRe-NAS (arXiv 2102.11646).

Stages of inverted residuals: each block has its own configuration (expansion, kernel, squeeze-and-excitation), each
stage its own depth. `models.binas_supernet` holds all of its networks, `search.binas` chooses one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from workloads.data.keys import uniform
from workloads.models.architecture import Architecture, Block
from workloads.models.binas import FEATURES, STEM
from workloads.models.structure import Channels

Depth = Annotated[int, Field(ge=1)]
Expansion = Annotated[int, Field(ge=1, le=99)]
MOST_PRODUCTS = 10_000  # of configurations and depths: the paper's 720; `search.ilp` has a variable for each


class Configuration(NamedTuple):
    expansion: int
    kernel: int
    se: bool

    def __str__(self) -> str:
        return f"k{self.kernel}_e{self.expansion}" + "_se" * self.se


class Paths(NamedTuple):
    """What each image of a batch goes through."""

    configuration: Tensor  # int64 [B, stages, blocks], into `Space.configurations`
    depth: Tensor  # int64 [B, stages], into `Space.depths`


class Space(BaseModel):
    """The networks that a supernet holds; the defaults are the paper's.

    Attributes:
        stem: channels in front of the blocks.
        first: channels of the separable convolution before the stages.
        widths, strides: of each stage.
        relu_stages: how many, from the first on, have ReLU; the others h-swish.
        min_depth, max_depth: blocks of a stage.
        expansions, kernels, se: what a block can have, the smaller first.
        last: channels of the last maps.
        features: of the hidden layer of the classifier.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stem: Channels = STEM
    first: Channels = 16
    widths: tuple[Channels, ...] = Field(default=(24, 40, 80, 112, 192), min_length=1)
    strides: Annotated[tuple[Annotated[int, Field(ge=1, le=2)], ...], Field(min_length=1)] = (2, 2, 2, 1, 2)
    relu_stages: int = Field(default=2, ge=0)
    min_depth: Depth = 2
    max_depth: Depth = 4
    expansions: tuple[Expansion, ...] = Field(default=(3, 4, 6), min_length=1)
    kernels: tuple[int, ...] = Field(default=(3, 5), min_length=1)
    se: Annotated[tuple[bool, ...], Field(min_length=1)] = (False, True)
    last: Channels = 960
    features: Channels = FEATURES

    @model_validator(mode="after")
    def _fits(self) -> Space:
        if len(self.widths) != len(self.strides):
            raise ValueError(
                f"got {len(self.widths)} widths and {len(self.strides)} strides, expected one for each stage"
            )
        if self.min_depth > self.max_depth:
            raise ValueError(f"got min_depth={self.min_depth}, expected at most max_depth, {self.max_depth}")
        for name in ("expansions", "kernels", "se"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"got {name}={list(values)}, expected each once, the smaller first")
        if not set(self.kernels) <= {3, 5, 7}:
            raise ValueError(f"got kernels={list(self.kernels)}, expected 3, 5 or 7")
        configurations = len(self.expansions) * len(self.kernels) * len(self.se)
        products = len(self.widths) * self.max_depth * configurations * len(self.depths)
        if products > MOST_PRODUCTS:
            raise ValueError(
                f"got a space of {products:,} products of blocks, configurations and depths, expected at most "
                f"{MOST_PRODUCTS:,}; allow fewer"
            )
        return self

    @property
    def depths(self) -> range:
        return range(self.min_depth, self.max_depth + 1)

    @property
    def configurations(self) -> list[Configuration]:
        """The last is the largest."""
        return list(itertools.starmap(Configuration, itertools.product(self.expansions, self.kernels, self.se)))

    def block(self, stage: int, block: int, configuration: int) -> Block:
        expansion, kernel, se = self.configurations[configuration]
        stride = 1 if block else self.strides[stage]
        return Block("ir", kernel, stride, self.widths[stage], expansion, stage < self.relu_stages, se)

    def architecture(self, configurations: Sequence[Sequence[int]], depths: Sequence[int]) -> Architecture:
        """The network with these configurations [stages][blocks] and these of the `depths` [stages]."""
        stages = [
            tuple(self.block(stage, block, configurations[stage][block]) for block in range(self.depths[depth]))
            for stage, depth in enumerate(depths)
        ]
        return (Block("ds", 3, 1, self.first, relu=True),), *stages, (Block("cn", 1, 1, self.last),)

    def random_paths(self, keys: Tensor, salt: str = "path") -> Paths:
        """Uniform over the space, for keys int64 [B]."""
        stages, decisions = len(self.widths), len(self.widths) * self.max_depth
        u = uniform(keys, decisions + stages, salt)
        configuration = (u[:, :decisions] * len(self.configurations)).long().unflatten(1, (stages, self.max_depth))
        return Paths(configuration, (u[:, decisions:] * len(self.depths)).long())
