"""Structure strings of Zen-NAS (Lin et al. 2021, arXiv 2102.01063): a network of convolutions as one line of text.

A string is a chain of parts, `Type(in,out,stride,layers)` of stem and tail and `Type(in,out,stride,bottleneck,layers)`
of the body, without anything between them:

    SuperConvK{1,3,5,7}BNRELU   convolutions
    SuperResK{3,5,7}K{same}     a layer is two full convolutions, in -> bottleneck -> out
    SuperResK1K{3,5,7}K1        a layer is two bottlenecks of 1 x 1, k x k and 1 x 1
    SuperResIDWE{1,2,4,6}K{3,5,7}
                                a layer is two inverted bottlenecks, whose k x k convolution is by channel and wider by
                                E: in -> bottleneck, bottleneck -> out

What a part is made of, and what it counts, is here; `models.zennet` builds it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Annotated

from pydantic import Field

KERNELS, EXPANSIONS = (3, 5, 7), (1, 2, 4, 6)
BODY = [
    *(f"SuperResK{k}K{k}" for k in KERNELS),
    *(f"SuperResK1K{k}K1" for k in KERNELS),
    *(f"SuperResIDWE{e}K{k}" for k in KERNELS for e in EXPANSIONS),
]
CONV = [f"SuperConvK{k}BNRELU" for k in (1, *KERNELS)]
EPS = 1e-3  # of every BatchNorm
EXAMPLE = "SuperConvK3BNRELU(3,8,1,1)"
MOST_CHANNELS, MOST_LAYERS = 99_999, 999  # of a part: far beyond any paper's, and what is counted stays small
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
MOST_TEXT = 100_000  # characters
String = Annotated[str, Field(max_length=MOST_TEXT)]
"""Of a whole network: the longest of the papers has 619."""
NUMBERS = re.compile(r"(?:[1-9][0-9]{0,4},)+[1-9][0-9]{0,2}")  # no more digits than these; layers are the last


class StructureError(ValueError):
    """A string that is no structure: says where, what was got and expected."""


@dataclass(frozen=True)
class Conv:
    """A convolution and its BatchNorm."""

    width_in: int
    width: int
    kernel: int
    stride: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Branch:
    """Convolutions in a row, a ReLU behind each; the last ReLU is behind the sum with the shortcut, if there is one.

    Attributes:
        convs: one or more.
        residual: whether its input is added.
        projects: whether that goes through a convolution of 1 x 1 with bias and a BatchNorm before.
    """

    convs: tuple[Conv, ...]
    residual: bool
    projects: bool = False


@dataclass(frozen=True)
class Part:
    """`Type(...)` of a structure string.

    Attributes:
        type: one of `CONV` and `BODY`.
        width_in, width: channels.
        stride: of its first layer.
        layers: in number.
        bottleneck: channels inside; None of stem and tail.
    """

    type: str
    width_in: int
    width: int
    stride: int
    layers: int
    bottleneck: int | None = None

    def __str__(self) -> str:
        inner = () if self.bottleneck is None else (self.bottleneck,)
        return f"{self.type}({','.join(map(str, (self.width_in, self.width, self.stride, *inner, self.layers)))})"

    @property
    def kernel(self) -> int:
        return _kernel(self.type)

    def branches(self) -> Iterator[Branch]:
        """What it computes, in order."""
        for layer, count in self.parts():
            for _ in range(count):
                yield from layer

    def parts(self) -> list[tuple[list[Branch], int]]:
        """Its first layer, once, and the others, which are alike, with their number."""
        first = self._layer(self.width_in, self.stride)
        if self.bottleneck is not None:
            first[0] = replace(first[0], projects=True)
        return [(first, 1), (self._layer(self.width, 1), self.layers - 1)]

    def _layer(self, width_in: int, stride: int) -> list[Branch]:
        if self.bottleneck is None:
            return [Branch((Conv(width_in, self.width, self.kernel, stride),), residual=False)]
        halves = self._halves(width_in, stride, self.bottleneck)
        return [Branch(convs, residual=True, projects=convs[0].width_in != convs[-1].width) for convs in halves]

    def _halves(self, width_in: int, stride: int, inner: int) -> list[tuple[Conv, ...]]:
        k = self.kernel
        if "IDW" in self.type:
            expansion = int(re.findall(r"E(\d)", self.type)[0])
            halves: list[tuple[Conv, ...]] = []
            for a, b, s in ((width_in, inner, stride), (inner, self.width, 1)):
                wide = round8(b * expansion)
                halves.append((Conv(a, wide, 1), Conv(wide, wide, k, s, groups=wide), Conv(wide, b, 1)))
            return halves
        if "K1" in self.type:
            return [
                (Conv(a, inner, 1), Conv(inner, inner, k, s), Conv(inner, self.width, 1))
                for a, s in ((width_in, stride), (self.width, 1))
            ]
        return [(Conv(width_in, inner, k, stride), Conv(inner, self.width, k))]


Structure = tuple[Part, ...]


@cache
def _kernel(kind: str) -> int:
    return max(int(k) for k in re.findall(r"K(\d)", kind))


def round8(channels: float) -> int:
    """To the nearest multiple of 8, at least 8."""
    return max(8, round(channels / 8) * 8)


def text(structure: Sequence[Part]) -> str:
    return "".join(map(str, structure))


@lru_cache(maxsize=1024)
def parse(string: str) -> Structure:
    """The parts of a structure string; `text` is the inverse.

    Raises:
        StructureError: what is wrong, and at which character.
    """
    parts: list[Part] = []
    at = 0
    while at < len(string):
        parts.append(_part(string, at, parts[-1].width if parts else None))
        at += len(str(parts[-1]))
    if not parts:
        raise StructureError(f"got an empty structure, expected parts such as {EXAMPLE}")
    return tuple(parts)


def parse_network(string: str) -> Structure:
    """`parse` of a whole network, whose first part sees images.

    Raises:
        StructureError: what is wrong, and at which character.
    """
    structure = parse(string)
    if structure[0].width_in != 3:
        raise StructureError(
            f"got {structure[0]} at character 0, which sees images, expected 3 channels to come in; "
            f"write {replace(structure[0], width_in=3)}"
        )
    return structure


def _part(string: str, at: int, width_before: int | None) -> Part:
    found = re.compile(r"(\w+)\(([^()]*)\)").match(string, at)
    if found is None:
        raise StructureError(
            f"got {string[at : at + 30]!r} at character {at}, expected Type(numbers); write parts such as {EXAMPLE}"
        )
    name, inside = found.groups()
    if name not in CONV and name not in BODY:
        near = difflib.get_close_matches(name, [*CONV, *BODY], n=3, cutoff=0)
        raise StructureError(f"got type {name[:30]!r} at character {at}, expected one such as {', '.join(near)}")
    fields = ["in", "out", "stride", *(["bottleneck"] if name in BODY else []), "layers"]
    numbers = inside.split(",")
    if len(numbers) != len(fields) or not NUMBERS.fullmatch(inside):
        raise StructureError(
            f"got {name}({inside:.60}) at character {at}, expected {name}({','.join(fields)}), 1 or more each, at "
            f"most {MOST_LAYERS} layers and {MOST_CHANNELS:,} channels"
        )
    values = dict(zip(fields, map(int, numbers), strict=True))
    part = Part(name, values["in"], values["out"], values["stride"], values["layers"], values.get("bottleneck"))
    if part.stride > 2:
        raise StructureError(
            f"got {part} at character {at}, expected a stride of 1 or 2; write {replace(part, stride=2)}"
        )
    if width_before not in (None, part.width_in):
        raise StructureError(
            f"got {part} at character {at}, behind a part of {width_before} channels, expected as many to come in; "
            f"write {replace(part, width_in=width_before)}"
        )
    return part


def layers(structure: Sequence[Part]) -> int:
    """As the budgets of the paper count them: two bottlenecks of one layer are one."""
    return sum(part.layers for part in structure)


def parameters(structure: Sequence[Part], classes: int) -> int:
    """As the released code counts: a BatchNorm as its channels, of a shortcut as none, a classifier's biases as one."""
    return sum(_count(part, None)[0] for part in structure) + structure[-1].width * classes + 1


def flops(structure: Sequence[Part], classes: int, size: int) -> int:
    """Multiply-adds as the released code counts them, in whose units the paper's budgets are.

    A BatchNorm counts as one for each value; a shortcut by its output's resolution divided by the stride once more.

    Args:
        structure: of the network.
        classes: of the classifier.
        size: side of the images.
    """
    total = structure[-1].width * classes
    for part in structure:
        count, size = _count(part, size)
        total += count
    return total


@lru_cache(maxsize=8192)  # a mutation leaves most parts as they were
def _count(part: Part, size: int | None) -> tuple[int, int]:
    """Multiply-adds of a part and the side of its maps; its parameters where `size` is None."""
    total = 0
    for branch, count in ((branch, count) for layer, count in part.parts() for branch in layer):
        stride = 1
        for conv in branch.convs:
            stride *= conv.stride
            if size is not None:
                size = -(-size // conv.stride)
            places = 1 if size is None else size**2
            total += count * (conv.width_in * conv.width // conv.groups * conv.kernel**2 + conv.width) * places
        if branch.projects:
            weights = (branch.convs[0].width_in + 1) * branch.convs[-1].width
            total += count * (weights if size is None else weights * size**2 // stride**2)
    return total, size or 1
