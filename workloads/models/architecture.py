"""Architecture strings of BINAS (Nayman et al. 2022, arXiv 2110.12399): a mobile network as one line of text.

A string lists the blocks of each stage, as the released code and timm write them:

    [['ds_r1_k3_s1_e1_c16_nre'], ['ir_r1_k5_s2_e3_c24_nre', 'ir_r1_k3_s1_e3_c24_nre_se0.25'], ['cn_r1_k1_s1_c960']]

    ds         separable convolution
    ir         inverted residual
    cn         convolution
    r1         each is there once
    k, s       kernel and stride
    e          how much wider it is inside
    c          channels that it gives
    nre        ReLU rather than h-swish
    se0.25     squeeze-and-excitation

What a block counts is here; `models.binas` builds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

EXAMPLE = "'ir_r1_k5_s2_e3_c24_nre_se0.25'"
PATTERN = re.compile(r"(ds|ir|cn)_r1_k([1357])_s([12])(?:_e([1-9][0-9]{0,1}))?_c([1-9][0-9]{0,4})(_nre)?(_se0\.25)?")


class ArchitectureError(ValueError):
    """A string that is no architecture: says where, what was got and expected."""


class Costs(NamedTuple):
    parameters: int
    flops: int  # multiply-adds of convolutions and linear layers


def mobile8(channels: float) -> int:
    """To the nearest multiple of 8, but not below 9 tenths of what was asked, as MobileNets do."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@dataclass(frozen=True)
class Block:
    """One entry of a string.

    Attributes:
        kind: ds, ir or cn.
        kernel, stride: of its spatial convolution.
        width: channels that it gives.
        expansion: of ir, channels inside by those that come in; of the others 1.
        relu: rather than h-swish.
        se: squeeze-and-excitation.
    """

    kind: str
    kernel: int
    stride: int
    width: int
    expansion: int = 1
    relu: bool = False
    se: bool = False

    def __str__(self) -> str:
        expansion = "" if self.kind == "cn" else f"_e{self.expansion}"
        shape = f"{self.kind}_r1_k{self.kernel}_s{self.stride}{expansion}_c{self.width}"
        return shape + "_nre" * self.relu + "_se0.25" * self.se

    def inside(self, width_in: int) -> int:
        """Channels of its spatial convolution."""
        return mobile8(width_in * self.expansion) if self.kind == "ir" else width_in

    def size(self, size: int) -> int:
        """Side of its maps for that of those that come in."""
        return -(-size // self.stride)

    def costs(self, width_in: int, size: int) -> Costs:
        """For maps of `width_in` channels of `size` x `size`."""
        mid, before, behind = self.inside(width_in), size**2, self.size(size) ** 2
        if self.kind == "cn":
            weights = width_in * self.width * self.kernel**2
            return Costs(weights + 2 * self.width, weights * behind)
        spatial, last = mid * self.kernel**2, mid * self.width
        parameters, flops = spatial + last + 2 * (mid + self.width), (spatial + last) * behind
        if self.kind == "ir":
            parameters, flops = parameters + width_in * mid + 2 * mid, flops + width_in * mid * before
        if self.se:
            weights = 2 * mid * mobile8(mid / 4)
            parameters, flops = parameters + weights + mid + mobile8(mid / 4), flops + weights
        return Costs(parameters, flops)


Architecture = tuple[tuple[Block, ...], ...]


def text(architecture: Sequence[Sequence[Block]]) -> str:
    return str([[str(block) for block in stage] for stage in architecture])


def parse(string: str) -> Architecture:
    """The blocks of an architecture string, by stage; `text` is the inverse.

    Raises:
        ArchitectureError: what is wrong, and at which character.
    """
    if not string.startswith("[["):
        raise ArchitectureError(f"got {string[:30]!r} at character 0, expected [[{EXAMPLE}, ...], ...]")
    stages: list[list[Block]] = [[]]
    at, separator = 2, ", "
    while separator != "]]":
        if separator == "], [":
            stages.append([])
        stages[-1].append(_block(string, at))
        at += len(f"'{stages[-1][-1]}'")
        found = re.compile(r", |\], \[|\]\]\Z").match(string, at)
        if found is None:
            raise ArchitectureError(
                f"got {string[at:][:30]!r} at character {at}, expected ', ' or '], [' or, last, ']]'"
            )
        at, separator = found.end(), found[0]
    return tuple(map(tuple, stages))


def _block(string: str, at: int) -> Block:
    quoted = re.compile("'([^']*)'").match(string, at)
    if quoted is None:
        raise ArchitectureError(f"got {string[at:][:30]!r} at character {at}, expected a block such as {EXAMPLE}")
    found = PATTERN.fullmatch(quoted[1])
    if found is None:
        raise ArchitectureError(
            f"got {quoted[0]:.60} at character {at}, expected KIND_r1_kN_sN_eN_cN, then maybe _nre, maybe _se0.25: "
            f"KIND ds, ir or cn, kernel 1, 3, 5 or 7, stride 1 or 2, e 1 to 99, c 1 to 99,999, such as {EXAMPLE}"
        )
    kind, kernel, stride, expansion, width, relu, se = found.groups()
    if (kind == "cn") != (expansion is None) or (kind == "ds" and expansion != "1") or (kind == "cn" and se):
        raise ArchitectureError(
            f"got {quoted[0]:.60} at character {at}, expected eN of ir, e1 of ds, and neither e nor se0.25 of cn"
        )
    return Block(kind, int(kernel), int(stride), int(width), int(expansion or 1), bool(relu), bool(se))


def walk(architecture: Sequence[Sequence[Block]], stem: int, size: int) -> Iterator[tuple[Block, int, int]]:
    """Each block with channels and side of the maps that come in.

    Args:
        architecture: of the network.
        stem: channels of the convolution in front.
        size: side of the images.
    """
    width, size = stem, -(-size // 2)
    for block in (block for stage in architecture for block in stage):
        yield block, width, size
        width, size = block.width, block.size(size)


def costs(
    architecture: Sequence[Sequence[Block]], *, stem: int, features: int, classes: int, size: int, blocks: bool = True
) -> Costs:
    """Of a whole network.

    Args:
        architecture: its blocks.
        stem: channels of the convolution in front.
        features: of the hidden layer of the classifier.
        classes: 0: an encoder, which ends with the features.
        size: side of the images.
        blocks: False leaves them out: what is in front of them and behind.
    """
    hidden = architecture[-1][-1].width * features
    around = Costs(
        29 * stem + hidden + features + (features + 1) * classes,
        27 * stem * (-(-size // 2)) ** 2 + hidden + features * classes,
    )
    found = [around, *(block.costs(width, side) for block, width, side in walk(architecture, stem, size) if blocks)]
    return Costs(sum(one.parameters for one in found), sum(one.flops for one in found))
