"""The spaces of MAE-DET (Sun et al. 2022, arXiv 2111.13336): which structures are neighbours.

A mutation is two changes, each of one block: its width, its kernel, its bottleneck or its number of layers; of a stem
the width. Number, kinds and strides of the blocks stay, so where a search starts decides whether its space is that of
K1KXK1 or, as for DAMO-YOLO, of K1KX. A change after which there are too many layers is drawn again, as often as there
are blocks. The released code never changes the last block, by a bound of its random numbers that excludes it; the
published networks have it changed, and here any block is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from numpy.random import Generator

from workloads.models.maedet_structure import Block, Structure, chained, layers, parse
from workloads.models.structure import round8

ROUNDS = 2
RATIOS = (1.5, 1.25, 0.8, 0.6, 0.5)  # of widths and bottlenecks
KERNELS = (3, 5)
STEPS = (-2, -1, 1, 2)  # of layers
THINNEST = 10  # a bottleneck has at least the width by this
T = TypeVar("T")


class Rules(NamedTuple):
    """What is allowed of a kind of blocks.

    Attributes:
        changes: drawn with equal chances.
        ratios: of widths and bottlenecks.
        early: layers that the block behind the stem has at most.
        convs: of a layer.
    """

    changes: tuple[str, ...]
    ratios: tuple[float, ...]
    early: int
    convs: int


_TWO = Rules(("width", "bottleneck", "layers"), (2.0, *RATIOS), early=2, convs=2)
RULES = {
    "ResK1KXK1": Rules(("width", "kernel", "bottleneck", "layers"), RATIOS, early=3, convs=3),
    "ResK1KX": _TWO,
    "ResKXKX": _TWO,
}


def _start(kind: str, blocks: Sequence[tuple[int, int, int]]) -> Structure:
    """Of (out, btn, s); a stem of 32 channels before, kernels of 3 and one layer each."""
    stem = {"class": "ConvKXBNRELU", "in": 3, "out": 32, "s": 2, "k": 3}
    widths = [32, *(width for width, _, _ in blocks)]
    body = [
        {"class": kind, "in": width_in, "out": width, "s": stride, "k": 3, "L": 1, "btn": inner}
        for width_in, (width, inner, stride) in zip(widths, blocks, strict=False)
    ]
    return parse([stem, *body])


START = {
    "k1kxk1": _start("ResK1KXK1", [(256, 64, 2), (512, 128, 2), (768, 256, 2), (1024, 256, 1), (2048, 512, 2)]),
    "k1kx": _start("ResK1KX", [(48, 32, 2), (96, 48, 2), (96, 96, 2), (192, 96, 1), (384, 192, 2)]),
}
"""Where the released searches start; that of K1KX, DAMO-YOLO's, here with a stem of stride 2 on images, rather than of
stride 1 on images of half the size and four times the channels."""


@dataclass(frozen=True)
class Space:
    """Bounds of a search.

    Attributes:
        size: side of the images; a kernel is at most 2/3 of what its block sees.
        layers: that a network may have.
        widest: most channels of a block.
        widest_stem: of a stem.
        ranges: least and most channels of each block, None where there are none; of blocks of two convolutions.
    """

    size: int
    layers: int
    widest: int = 2048
    widest_stem: int = 32
    ranges: tuple[tuple[int, int] | None, ...] | None = None

    def mutate(self, structure: Structure, random: Generator) -> Structure:
        """Another structure, with too many layers only where all draws had."""
        for _ in range(ROUNDS):
            for _ in structure:
                changed = self._changed(structure, int(random.integers(len(structure))), random)
                if layers(changed) <= self.layers:
                    break
            structure = changed
        return structure

    def smallest(self, structure: Structure) -> Structure:
        """The same blocks at their least."""
        blocks, width = [], 8
        for at, block in enumerate(structure):
            width = max(width, self._range(at)[0])
            least = {"width": width, "kernel": min(block.kernel, *KERNELS)}
            if block.layers is not None:
                least |= {"layers": 1, "bottleneck": _thick(8, width)}
            blocks.append(block.model_copy(update=least))
        return self._fitted(blocks)

    def _changed(self, structure: Structure, at: int, random: Generator) -> Structure:
        """One change of block `at`, which may turn out to be none."""
        blocks, block = list(structure), structure[at]
        after = structure[at + 1] if at + 1 < len(structure) else None
        if block.layers is None or block.bottleneck is None:  # a stem
            if after is None:
                return structure
            ratios = RULES[after.kind].ratios if after.kind in RULES else RATIOS
            width = min(self._drawn(block.width, ratios, random), self.widest_stem, after.width)
            blocks[at] = block.model_copy(update={"width": width})
            return self._fitted(blocks)
        rules = RULES[block.kind]
        width, bottleneck, depth = block.width, block.bottleneck, block.layers
        kernel: int = block.kernel
        change = _one(rules.changes, random)
        if change == "width":
            width = self._bounded(self._drawn(width, rules.ratios, random), at, block, after)
            if rules.convs == 2 and after is not None and after.bottleneck is not None:
                blocks[at + 1] = after.model_copy(update={"bottleneck": min(after.bottleneck, width)})
        elif change == "kernel":
            kernel = _one([k for k in KERNELS if k != kernel], random)
        elif change == "bottleneck":
            bottleneck = min(self._drawn(bottleneck, rules.ratios, random), width)
        else:
            others = [n for step in STEPS if (n := max(1, depth + step)) != depth]
            depth = min(_one(others, random), self._deepest(at, len(structure), rules))
        update = {"width": width, "kernel": kernel, "bottleneck": _thick(bottleneck, width), "layers": depth}
        blocks[at] = block.model_copy(update=update)
        return self._fitted(blocks)

    def _drawn(self, channels: int, ratios: Sequence[float], random: Generator) -> int:
        return min(round8(channels * _one(ratios, random)), self.widest)

    def _bounded(self, width: int, at: int, block: Block, after: Block | None) -> int:
        """Not below what comes in, not above the next; with K1KXK1 neither grows more than four times by a block."""
        if RULES[block.kind].convs == 2:
            least, most = self._range(at)
            width = max(block.width_in, min(max(width, least), most))
            return width if after is None else min(width, after.width)
        width = max(block.width_in, min(width, 4 * block.width_in))
        return width if after is None else max(min(width, after.width), round8(after.width / 4))

    def _range(self, at: int) -> tuple[int, int]:
        return (self.ranges[at] if self.ranges else None) or (8, self.widest)

    def _deepest(self, at: int, blocks: int, rules: Rules) -> int:
        """The first block of the body has few layers, the others an equal share of what is allowed."""
        if at == 1:
            return rules.early
        return max(1, self.layers // rules.convs // max(1, blocks - 2))

    def _fitted(self, blocks: Sequence[Block]) -> Structure:
        """Channels linked, kernels not much larger than what they see."""
        found, size = [], float(self.size)
        for block in chained(blocks):
            kernel: int = block.kernel
            while kernel > 1 and 1.5 * kernel > size:
                kernel -= 2
            found.append(block if kernel == block.kernel else block.model_copy(update={"kernel": kernel}))
            size /= block.stride
        return tuple(found)


def _thick(bottleneck: int, width: int) -> int:
    return bottleneck if bottleneck >= width / THINNEST else round8(width / THINNEST)


def _one(of: Sequence[T], random: Generator) -> T:
    return of[int(random.integers(len(of)))]
