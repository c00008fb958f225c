"""Structures of MAE-DET (Sun et al. 2022, arXiv 2111.13336): a network as a list of blocks, with the released keys.

    [{"class": "ConvKXBNRELU", "in": 3, "out": 32, "s": 2, "k": 3},
     {"class": "ResK1KXK1", "in": 32, "out": 48, "s": 2, "k": 5, "L": 2, "btn": 32}]

    ConvKXBNRELU    a convolution of k x k
    ResK1KXK1       L layers of three convolutions: 1 x 1, k x k and 1 x 1, with btn channels inside
    ResK1KX         of two, 1 x 1 and k x k, with btn channels between (DAMO-YOLO)
    ResKXKX         of two, both k x k

Only the first layer of a block has its stride s. A stage ends where the next block has stride 2. What a block is made
of, and what it counts, is here; `models.maedet` builds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from operator import mul
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from workloads.catalog import problems_of
from workloads.models.structure import MOST_TEXT, Branch, Channels, Conv, Layers, StructureError

NESTED = re.compile(r"[\[{\]}]|[0-9]{20,}")


def _short(name: Any) -> Any:
    """Released files say SuperResK1KXK1 of a block of L layers."""
    return name.removeprefix("Super") if isinstance(name, str) else name


class Block(BaseModel):
    """Layers of one kind; in JSON and YAML by the released keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    kind: Annotated[Literal["ConvKXBNRELU", "ResK1KXK1", "ResK1KX", "ResKXKX"], BeforeValidator(_short)] = Field(
        alias="class"
    )
    width_in: Channels = Field(alias="in")
    width: Channels = Field(alias="out")
    stride: Literal[1, 2] = Field(alias="s")
    kernel: Literal[1, 3, 5, 7] = Field(alias="k")
    layers: Layers | None = Field(default=None, alias="L")
    bottleneck: Channels | None = Field(default=None, alias="btn")

    @model_validator(mode="after")
    def _of_its_kind(self) -> Block:
        given = [key for key, value in (("L", self.layers), ("btn", self.bottleneck)) if value is not None]
        needed = [] if self.kind == "ConvKXBNRELU" else ["L", "btn"]
        if given != needed:
            raise ValueError(
                f"got {' and '.join(given) or 'no L and btn'} of {self.kind}, expected "
                f"{' and '.join(needed) or 'neither L nor btn'}"
            )
        return self

    def parts(self) -> list[tuple[Branch, int]]:
        """Its first layer, once, and the others, which are alike, with their number.

        As in the released code the shortcut of the first layer of ResK1KXK1 goes through a convolution always, of
        others where channels differ.
        """
        if self.layers is None:
            return [(Branch((Conv(self.width_in, self.width, self.kernel, self.stride),), residual=False), 1)]
        differ = self.width_in != self.width
        first = self._layer(self.width_in, self.stride, projects=differ or self.kind == "ResK1KXK1")
        return [(first, 1), (self._layer(self.width, 1, projects=False), self.layers - 1)]

    def _layer(self, width_in: int, stride: int, *, projects: bool) -> Branch:
        inner, k = self.bottleneck, self.kernel
        assert inner is not None
        if self.kind == "ResK1KXK1":
            convs = (Conv(width_in, inner, 1), Conv(inner, inner, k, stride), Conv(inner, self.width, 1))
            return Branch(convs, True, projects)
        first = k if self.kind == "ResKXKX" else 1
        return Branch((Conv(width_in, inner, first), Conv(inner, self.width, k, stride)), True, projects)


Structure = tuple[Block, ...]
_blocks: TypeAdapter[Structure] = TypeAdapter(Annotated[Structure, Field(max_length=999)])


def parse(value: Any) -> Structure:
    """The blocks of a structure: of JSON text, or of what is read already; `text` is the inverse.

    Raises:
        StructureError: what is wrong, and at which character or in which block.
    """
    if isinstance(value, str):
        value = _read(value)
    try:
        blocks = _blocks.validate_python(value)
    except ValidationError as error:
        (where, message), *_ = problems_of(error, Block)
        if not where:
            raise StructureError(f"{message}, expected a list of blocks such as {text(EXAMPLE)}") from error
        place = ", ".join([f"block {int(where[0]) + 1}", *map(str, where[1:])])
        raise StructureError(f"in {place}: {message} (a block is such as {json.dumps(BODY)})") from error
    width = 3
    for i, block in enumerate(blocks, 1):
        if block.width_in != width:
            source = "the first, which sees images" if i == 1 else f"behind one of {width} channels"
            raise StructureError(f"got block {i} with in: {block.width_in}, {source}, expected in: {width}")
        width = block.width
    if not blocks:
        raise StructureError(f"got no block, expected some such as {text(EXAMPLE)}")
    return blocks


def _read(string: str) -> Any:
    """JSON, but for lists in blocks and numbers without end: these Python refuses without a place, or by recursion."""
    depth = 0
    if len(string) > MOST_TEXT:
        raise StructureError(f"got {len(string):,} characters, expected at most {MOST_TEXT:,}; take fewer blocks")
    for found in NESTED.finditer(string):
        depth += -1 if found[0] in "]}" else 1 if found[0] in "[{" else 3
        if depth > 2:
            at, why = found.start(), "a structure has neither lists in blocks nor such numbers"
            break
    else:
        try:
            return json.loads(string)
        except json.JSONDecodeError as error:
            at, why = error.pos, error.msg
    raise StructureError(
        f"got {string[at : at + 30]!r} at character {at}, expected a list of blocks as JSON such as {text(EXAMPLE)} "
        f"({why})"
    )


def text(structure: Sequence[Block]) -> str:
    """As one line of JSON."""
    return json.dumps(plain(structure))


def plain(structure: Sequence[Block]) -> list[dict[str, Any]]:
    """As lists and dicts, for JSON and YAML."""
    return [block.model_dump(by_alias=True, exclude_none=True) for block in structure]


def chained(blocks: Sequence[Block]) -> Structure:
    """The same blocks, each with the channels that the one before gives."""
    widths = [3, *(block.width for block in blocks)]
    return tuple(
        block if block.width_in == width else block.model_copy(update={"width_in": width})
        for block, width in zip(blocks, widths, strict=False)
    )


def stages(structure: Sequence[Block]) -> list[int]:
    """The index of the last block of each stage."""
    return [i for i in range(len(structure)) if i + 1 == len(structure) or structure[i + 1].stride == 2]


def strides(structure: Sequence[Block]) -> list[int]:
    """Pixels between two places of the maps behind each block."""
    return list(accumulate((block.stride for block in structure), mul))


def layers(structure: Sequence[Block]) -> int:
    """Convolutions in number, without those of shortcuts."""
    return sum(count * len(branch.convs) for branch, count in _parts(structure))


def parameters(structure: Sequence[Block]) -> int:
    """Of convolutions and BatchNorms, without a classifier."""
    found = 0
    for branch, count in _parts(structure):
        found += count * sum((conv.width_in * conv.kernel**2 + 2) * conv.width for conv in branch.convs)
        if branch.projects:
            found += (branch.convs[0].width_in + 2) * branch.convs[-1].width
    return found


def flops(structure: Sequence[Block], size: int) -> int:
    """As the released code counts them, in whose units the paper's budgets are.

    A multiply-add is one, a BatchNorm two of each value, a ReLU one of each value behind a convolution and behind a
    shortcut's, pooling one of each value that it reads; a map is size / stride places wide, also where that is no
    whole number.

    Args:
        structure: of the network.
        size: side of the images.
    """
    found, stride = 0.0, 1
    for branch, count in _parts(structure):
        first, last = branch.convs[0], branch.convs[-1]
        before = stride
        for conv in branch.convs:
            stride *= conv.stride
            found += count * (conv.width_in * conv.kernel**2 + 3) * conv.width * (size / stride) ** 2
        if branch.residual and stride > before:
            found += first.width_in * (size / before) ** 2
        if branch.projects:
            found += (first.width_in + 3) * last.width * (size / stride) ** 2
    return round(found)


def _parts(structure: Sequence[Block]) -> Iterator[tuple[Branch, int]]:
    return chain.from_iterable(block.parts() for block in structure)


BODY = {"class": "ResK1KXK1", "in": 32, "out": 48, "s": 2, "k": 5, "L": 2, "btn": 32}
EXAMPLE: Structure = (Block(kind="ConvKXBNRELU", width_in=3, width=32, stride=2, kernel=3),)
