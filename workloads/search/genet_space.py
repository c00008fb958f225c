"""What GENet's search (Lin et al. 2020, arXiv 2006.14090) is given: a master network, and the blocks to try in it.

A block keeps its stride; kind, kernel, depth and width change. A candidate is the JSON of what `model: {name: genet}`
takes: `{"stem": 13, "blocks": [["XX", 48, 1, 2, 3], ...], "last": 1920}`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from workloads.models.encoders import model_config
from workloads.models.genet import RATIO, Block, GENetConfig
from workloads.models.structure import MOST_CHANNELS, MOST_LAYERS, Branch, Conv, round8
from workloads.search.base import SearchConfig
from workloads.search.budget import COUNTED
from workloads.search.latency_budget import LatencyBudget
from workloads.search.latency_ops import TableError, of_branches
from workloads.spec import Named

MOST_CANDIDATES = 10_000  # each is distilled, which takes seconds at least


class Choices(SearchConfig):
    """What may stand in a block's place; all combinations are measured, once.

    Attributes:
        kinds: of layers.
        kernels: of the layers' middle convolution (of XX: of both).
        depths: layers more, or fewer; at least one stays.
        widths: factors of the block's channels, to multiples of 8.
    """

    kinds: tuple[Literal["XX", "BL", "DW"], ...] = Field(default=("XX", "BL", "DW"), min_length=1, max_length=3)
    kernels: tuple[Literal[3, 5], ...] = Field(default=(3, 5), min_length=1, max_length=2)
    depths: tuple[Annotated[int, Field(gt=-MOST_LAYERS, lt=MOST_LAYERS)], ...] = Field(
        default=(-1, 0, 1), min_length=1, max_length=16
    )
    widths: tuple[Annotated[float, Field(gt=0, le=8)], ...] = Field(
        default=(0.75, 1.0, 1.25), min_length=1, max_length=16
    )

    def instead_of(self, block: Block) -> list[Block]:
        """Blocks that may replace one; itself is not among them."""
        widths = [block.channels if factor == 1 else round8(block.channels * factor) for factor in self.widths]
        found = [
            Block(kind, width, block.layers + more, block.stride, kernel)
            for kind, kernel, more, width in itertools.product(self.kinds, self.kernels, self.depths, widths)
            if 1 <= block.layers + more <= MOST_LAYERS and width <= MOST_CHANNELS
        ]
        return [one for one in dict.fromkeys(found) if one != block]


def replaced(network: GENetConfig, blocks: dict[int, Block]) -> GENetConfig:
    """The network with other blocks at some places."""
    return network.model_copy(update={"blocks": tuple(blocks.get(i, b) for i, b in enumerate(network.blocks))})


def text(network: GENetConfig) -> str:
    """As one line; `parse` is the inverse, but for the image size."""
    blocks = [list(block) for block in network.blocks]
    return json.dumps({"stem": network.stem, "blocks": blocks, "last": network.last})


def parse(line: str, like: GENetConfig) -> GENetConfig:
    """The network of a line, for images of the size of another's."""
    return GENetConfig.model_validate({"image_size": like.image_size, **json.loads(line)})


def branches(network: GENetConfig) -> Iterator[Branch]:
    """What the network computes, in order."""
    yield Branch((Conv(3, network.stem, 3, 2),), residual=False)
    width = network.stem
    for block in network.blocks:
        for i in range(block.layers):
            out, stride, k = block.channels, 1 if i else block.stride, block.kernel
            mid = round(out * RATIO[block.kind])
            if block.kind == "XX":
                convs: tuple[Conv, ...] = (Conv(width, mid, k, stride), Conv(mid, out, k))
            else:
                inner = Conv(mid, mid, k, stride, groups=mid if block.kind == "DW" else 1)
                convs = (Conv(width, mid, 1), inner, Conv(mid, out, 1))
            yield Branch(convs, residual=True, projects=stride > 1 or width != out)
            width = out
    yield Branch((Conv(width, network.last, 1),), residual=False)


def costs(network: GENetConfig) -> dict[str, float]:
    """Parameters and multiply-adds of convolutions, both without a classifier, and layers (stem and last are one each).

    Args:
        network: of square images.
    """
    size, parameters, flops = network.image_size, 0, 0
    assert isinstance(size, int)
    for branch in branches(network):
        convs = branch.convs
        for conv in convs:
            size = -(-size // conv.stride)
            weights = conv.width_in * conv.width // conv.groups * conv.kernel**2
            parameters += weights + 2 * conv.width  # of the BatchNorm
            flops += weights * size**2
        if branch.projects:
            weights = convs[0].width_in * convs[-1].width
            parameters += weights + 2 * convs[-1].width
            flops += weights * size**2
    return {"parameters": parameters, "flops": flops, "layers": 2 + sum(block.layers for block in network.blocks)}


def _genet(model: Any) -> GENetConfig:
    config = model if isinstance(model, GENetConfig) else model_config(Named.model_validate(model))
    if not isinstance(config, GENetConfig):
        raise ValueError("got another network, expected a GENet to start from; use genet_normal, or genet with a table")
    if not isinstance(config.image_size, int):
        raise ValueError(f"got image_size={list(config.image_size)}, expected one number: latency is of squares")
    return config


class GENetBudget(SearchConfig):
    """Latency alone: the method asks for the most accuracy within it, by sums over blocks.

    What parameters and FLOPs a block has depends on the width of the one before, so no sum of single replacements is
    a bound on them; they and the layers are counted for each row of the population, to choose among them.
    """

    latency: LatencyBudget

    @model_validator(mode="before")
    @classmethod
    def _latency_alone(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and (counted := [name for name in COUNTED if name in fields]):
            raise ValueError(
                f"got {', '.join(counted)} in a budget of genet, expected latency alone, which its method adds up over "
                "blocks; leave out the others and choose among the rows of population.parquet, which count them"
            )
        return fields


class GENetLLRConfig(SearchConfig):
    """`{name: genet, master: {name: genet_normal}, budget: {latency: {ms: 0.21, device: cuda}}}`.

    Attributes:
        master: the network around which is searched, as `model:` of the job that trained it (`init:`).
        budget: ms per image of the result.
        choices: what may stand in a block's place.
        steps: of the distillation of each.
        batch_size: of the distillation.
        lr: of the distillation.
        alternatives: networks to keep.
    """

    master: Annotated[GENetConfig, BeforeValidator(_genet, json_schema_input_type=Named)]
    budget: GENetBudget
    choices: Choices = Choices()
    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=64, ge=2)
    lr: float = Field(default=2e-3, gt=0)
    alternatives: int = Field(default=10, ge=1)

    @property
    def size(self) -> int:
        assert isinstance(self.master.image_size, int)
        return self.master.image_size

    @property
    def ms(self) -> float:
        """The budget."""
        return self.budget.latency.ms

    @cached_property
    def replacements(self) -> list[tuple[int, GENetConfig]]:
        """Every network with one replaced block, and the block's number."""
        return [
            (at, replaced(self.master, {at: other}))
            for at, block in enumerate(self.master.blocks)
            for other in self.choices.instead_of(block)
        ]

    @model_validator(mode="after")
    def _replaces(self) -> GENetLLRConfig:
        count = sum(len(self.choices.instead_of(block)) for block in self.master.blocks)
        if count > MOST_CANDIDATES:
            raise ValueError(
                f"got choices of {count:,} candidates, expected at most {MOST_CANDIDATES:,}; allow fewer for each block"
            )
        if not count:
            raise ValueError("got choices that hold nothing but the master's blocks, expected others; allow more")
        return self

    def least(self) -> Mapping[str, float]:
        """As the search adds latencies up; known where a table says them."""
        if (table := self.budget.latency.read_table(self.size)) is None:
            return {}
        networks = [self.master, *(network for _, network in self.replacements)]
        t0, *ts = (table.predict(of_branches(branches(network), self.size)) for network in networks)
        return {"latency_ms": self.fastest(t0, dict(enumerate(ts, 1)))}

    def fastest(self, t0: float, replaced: Mapping[int, float]) -> float:
        """Latency in ms of the fastest network, by the sums.

        Args:
            t0: of the master.
            replaced: of it with a replacement, by the number of that from 1 on; what is not known counts as no gain.
        """
        saved = [0.0 for _ in self.master.blocks]
        for number, (at, _) in enumerate(self.replacements, 1):
            saved[at] = min(saved[at], replaced.get(number, t0) - t0)
        return t0 + sum(saved)

    def problems(self, device: str) -> list[tuple[tuple[str | int, ...], str]]:
        if found := self.budget.latency.problems(device, self.size):
            return [(("budget", "latency"), problem) for problem in found]
        try:
            least = self.least().get("latency_ms", 0.0)
        except TableError as error:
            return [(("budget", "latency", "table"), str(error))]
        if least > self.ms:
            return [(("budget", "latency", "ms"), f"got {self.ms:g}, expected at least {least:.4g}; allow as much")]
        return []
