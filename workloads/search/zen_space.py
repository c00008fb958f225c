"""The spaces of Zen-NAS (Lin et al. 2021, arXiv 2102.01063): which structures are neighbours.

A mutation replaces parts. Stem and tail only get another width; a part of the body gets any type of its space, any of
nine widths and bottlenecks and of five depths about its own, and keeps its stride. Widths are multiples of 8, but that
one below 8 may stay what it is. `server` has full convolutions and bottlenecks, `mobile` inverted bottlenecks, whose
last convolution never changes.

The released code draws some types more often than others, as its lists of candidates share memory; here all are
equally likely, unless one asks for its `RELEASED`. Its bound of 2048 on widths of the server space is kept, though
the paper's own networks have up to 6704 channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

from numpy.random import Generator

from workloads.models.structure import BODY, Part, Structure, round8

Space = Literal["server", "mobile"]
TYPES: dict[Space, list[str]] = {
    "server": [name for name in BODY if "IDW" not in name],
    "mobile": [name for name in BODY if "IDW" in name],
}
RELEASED: dict[Space, list[str]] = {  # as often as the released code draws each
    "server": [name for name in TYPES["server"] for _ in range(2 if "K7" in name else 3)],
    "mobile": [
        name for name, times in zip(TYPES["mobile"], (12, *range(12, 1, -1)), strict=True) for _ in range(times)
    ],
}
MAX_WIDTH = {"server": 2048.0, "mobile": 65536.0}
NARROW = 8  # channels, below which mutations do not lead
FACTORS = (2.5, 2, 1.5, 1.25, 1, 1 / 1.25, 1 / 1.5, 1 / 2, 1 / 2.5)
SPLIT_AT, SPLIT_OFF = 6, 3
START = {
    "cifar": "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,1,8,1)SuperResK3K3(16,32,2,16,1)SuperResK3K3(32,64,2,32,1)"
    "SuperResK3K3(64,64,2,32,1)SuperConvK1BNRELU(64,128,1,1)",
    "imagenet": "SuperConvK3BNRELU(3,32,2,1)SuperResK3K3(32,64,2,32,1)SuperResK3K3(64,128,2,64,1)"
    "SuperResK3K3(128,256,2,128,1)SuperResK3K3(256,512,2,256,1)SuperConvK1BNRELU(512,512,1,1)",
    "imagenet-mobile": "SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K3(8,32,2,8,1)SuperResIDWE6K3(32,48,2,32,1)"
    "SuperResIDWE6K3(48,96,2,48,1)SuperResIDWE6K3(96,128,2,96,1)SuperConvK1BNRELU(128,2048,1,1)",
}
"""Where the searches of the paper start."""
T = TypeVar("T")


def widths(width: int, space: Space) -> list[int]:
    """Channels that one of `width` may become, the most first."""
    rounded = {round8(min(MAX_WIDTH[space], width * factor)) for factor in FACTORS}
    return sorted(rounded | ({width} if width < NARROW else set()), reverse=True)


def frozen(part: Part, space: Space) -> bool:
    """Whether its width stays: of the last convolution of mobile networks."""
    return space == "mobile" and part.bottleneck is None and part.kernel == 1


def depths(layers: int) -> list[int]:
    return [n for n in range(layers - 2, layers + 3) if n > 0]


def choices(
    part: Part, space: Space, types: Mapping[Space, list[str]] = TYPES
) -> tuple[list[str], list[int], list[int | None], list[int]]:
    """Types, widths, bottlenecks and depths that a part may become, each with each."""
    if part.bottleneck is None:
        of_width = [part.width] if frozen(part, space) else widths(part.width, space)
        return [part.type], of_width, [None], [part.layers]
    return types[space], widths(part.width, space), [*widths(part.bottleneck, space)], depths(part.layers)


def mutate(
    structure: Structure, times: int, space: Space, random: Generator, types: Mapping[Space, list[str]] = TYPES
) -> Structure:
    """Another structure: up to `times` of its parts replaced (one that is drawn again stays), long ones split."""
    parts = list(structure)
    for at in set(random.integers(len(parts), size=times).tolist()):
        of_type, of_width, bottlenecks, of_layers = choices(parts[at], space, types)
        parts[at] = replace(
            parts[at],
            type=_one(of_type, random),
            width=_one(of_width, random),
            bottleneck=_one(bottlenecks, random),
            layers=_one(of_layers, random),
        )
    return split(chained(parts))


def _one(of: Sequence[T], random: Generator) -> T:
    return of[int(random.integers(len(of)))]


def chained(parts: Sequence[Part]) -> Structure:
    """Each part takes in what the one before gives."""
    linked = [parts[0]]
    for part in parts[1:]:
        linked.append(replace(part, width_in=linked[-1].width))
    return tuple(linked)


def split(structure: Structure) -> Structure:
    """Parts of the body with 6 layers or more become two, of 3 and the rest; once, the rest may be long again."""
    found: list[Part] = []
    for part in structure:
        if part.bottleneck is None or part.layers < SPLIT_AT:
            found.append(part)
        else:
            found.append(replace(part, layers=SPLIT_OFF))
            found.append(replace(part, width_in=part.width, stride=1, layers=part.layers - SPLIT_OFF))
    return tuple(found)


def smallest(structure: Structure, space: Space) -> list[Structure]:
    """The same parts at their least: one layer, 8 channels or fewer; of their own types, and of each of the space."""
    found: dict[Structure, None] = {}
    for name in (None, *TYPES[space]):
        parts = [
            replace(
                part,
                type=part.type if part.bottleneck is None or name is None else name,
                width=part.width if frozen(part, space) else min(part.width, NARROW),
                bottleneck=None if part.bottleneck is None else min(part.bottleneck, NARROW),
                layers=1,
            )
            for part in structure
        ]
        found[chained(parts)] = None
    return list(found)
