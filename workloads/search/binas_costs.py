"""What the networks of a BINAS space cost (arXiv 2110.12399), as forms that are bilinear in their decisions.

A network is the sum of its blocks, so a table of blocks says all: multiply-adds and parameters are counted, latency is
measured once for each block at its place (kernel, stride, channels, resolution, activation), or looked up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workloads.models.architecture import Block, costs, walk
from workloads.models.binas import HiddenHead, layer
from workloads.models.binas_space import Space
from workloads.search.bilinear import Bilinear, Shape
from workloads.search.latency import DTYPE, expect_precision, folded, placed, timed
from workloads.search.latency_budget import LatencyBudget
from workloads.search.latency_ops import operations

REST = "rest"  # what every network has


def shape_of(space: Space) -> Shape:
    return Shape(len(space.widths), space.max_depth, len(space.configurations), tuple(space.depths))


def places(space: Space, size: int) -> list[list[tuple[Block, int, int]]]:
    """By configuration, then stage and block: each block with channels and side of the maps that come in.

    Args:
        space: of the networks.
        size: side of the images.
    """
    deepest = [-1] * len(space.widths)
    found = []
    for c in range(len(space.configurations)):
        whole = space.architecture([[c] * space.max_depth] * len(space.widths), deepest)
        found.append(list(walk(whole, space.stem, size))[1:-1])
    return found


def form(space: Space, size: int, rest: float, cost: Callable[[Block, int, int], float]) -> Bilinear:
    """The form of what blocks cost; `rest` is what every network has."""
    of_blocks = np.array([[cost(*place) for place in row] for row in places(space, size)])
    stages = of_blocks.reshape(len(of_blocks), len(space.widths), space.max_depth)
    return Bilinear.of_terms(shape_of(space), rest, np.moveaxis(stages, 0, 2))


def counted(space: Space, size: int, classes: int) -> dict[str, Bilinear]:
    """Parameters, multiply-adds, and layers: blocks of the stages."""
    options: dict[str, Any] = {"stem": space.stem, "features": space.features, "classes": classes, "size": size}
    whole = space.architecture([[0] * space.max_depth] * len(space.widths), [0] * len(space.widths))
    every = list(walk(whole, space.stem, size))
    rest = np.sum(
        [costs(whole, **options, blocks=False), *(b.costs(w, s) for b, w, s in (every[0], every[-1]))], axis=0
    )
    return {
        "parameters": form(space, size, rest[0], lambda block, width, side: block.costs(width, side).parameters),
        "flops": form(space, size, rest[1], lambda block, width, side: block.costs(width, side).flops),
        "layers": form(space, size, 0.0, lambda *_: 1.0),
    }


def key(block: Block, width_in: int, side: int) -> str:
    """Of a block in a latency table."""
    return f"{block} of {width_in} x {side} x {side}"


def latency(space: Space, size: int, table: dict[str, float]) -> Bilinear:
    """Milliseconds per image by what `table_of` gave."""
    return form(space, size, table[REST], lambda *place: table[key(*place)])


def table_of(
    space: Space, size: int, classes: int, ms: Callable[[nn.Module, tuple[int, int, int]], float]
) -> dict[str, float]:
    """Milliseconds per image of each block of the space, and of the rest.

    Args:
        space: of the networks.
        size: side of the images.
        classes: of the classifier.
        ms: of a module, for maps [C, H, W].
    """
    whole = space.architecture([[0] * space.max_depth] * len(space.widths), [0] * len(space.widths))
    (first, _, _), *_, (last, last_in, last_side) = walk(whole, space.stem, size)
    with torch.device("meta"):
        head = HiddenHead(space.stem, space.last, space.features, architecture="", args={})
        head.reset_classifier(classes)
        front = nn.Sequential(head.conv_stem, head.bn1, head.act, layer(first, space.stem))
        back = _Back(layer(last, last_in), head)
        table = {REST: ms(front, (3, size, size)) + ms(back, (last_in, last_side, last_side))}
        for block, width_in, side in itertools.chain(*places(space, size)):
            if key(block, width_in, side) not in table:  # later blocks of a stage are alike
                table[key(block, width_in, side)] = ms(layer(block, width_in), (width_in, side, side))
    return table


class PartLatency:
    """Milliseconds per image of parts of networks, measured on this machine or by a table of `search.latency_table`."""

    def __init__(self, budget: LatencyBudget, size: int) -> None:
        """Reads the table, if there is one.

        Args:
            budget: says where and how.
            size: side of the images.
        """
        self.budget, self.size, self.table = budget, size, budget.read_table(size)

    def __call__(self, part: nn.Module, shape: tuple[int, int, int]) -> float:
        """Of a module for maps [C, H, W]; one on the meta device will do.

        Raises:
            TableError: the table does not cover it.
        """
        if self.table is not None:
            return self.table.predict(operations(nn.Sequential(_Maps(shape), part), self.size))
        budget, device, precision = self.budget, torch.device(self.budget.device), self.budget.resolved_precision
        expect_precision(precision, device)
        part = placed(folded(part), device, precision)
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": DTYPE[precision]}
        with torch.inference_mode():
            x = torch.randn(budget.batch_size, *shape, **options).contiguous(memory_format=torch.channels_last)
            return timed(lambda: part(x), device) / budget.batch_size


class _Maps(nn.Module):
    """Maps of a shape, whatever the images."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        return torch.empty(len(images), *self.shape, device=images.device)


class _Back(nn.Module):
    """What is behind the stages."""

    def __init__(self, last: nn.Module, head: HiddenHead) -> None:
        super().__init__()
        self.last, self.head = last, head

    def forward(self, maps: Tensor) -> Tensor:
        return self.head.forward_head(self.last(maps))


def blocks_of(space: Space, size: int, architecture: Any) -> Iterator[dict[str, Any]]:
    """To draw a network: `label`, `channels`, `size`, `layers`, `stride` of each block."""
    for block, _, side in walk(architecture, space.stem, size):
        label = (
            f"{block.kind} {block.kernel}x{block.kernel}"
            + f" e{block.expansion}" * (block.kind == "ir")
            + " se" * block.se
        )
        yield {"label": label, "channels": block.width, "size": block.size(side), "layers": 1, "stride": block.stride}
