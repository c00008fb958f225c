"""The parts of a network that take time, counted: convolutions, linear layers, activations, sums and means.

What `search.latency_table` adds up. BatchNorms are folded into their convolutions before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from workloads.models.structure import Branch, Structure
from workloads.search.latency import folded


class TableError(ValueError):
    """A table that cannot be used, or does not cover what is asked; says what to measure."""


class Op(NamedTuple):
    """A part of a network.

    Attributes:
        family: all but the numbers that are interpolated over: `conv 3x3 stride 2 at 56`, `depthwise ...`, `linear`,
            `relu`, `add`, `mean`.
        sizes: channels in and out, channels of a convolution by channel, or values for each image.
    """

    family: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.family} of {' -> '.join(map(str, self.sizes))}"


def conv(kernel: int, stride: int, width_in: int, width: int, side: int, groups: int = 1) -> Op:
    """A convolution over maps of `side` x `side`; as it comes in."""
    name = f"{kernel}x{kernel} stride {stride} at {side}"
    if groups == 1:
        return Op(f"conv {name}", (width_in, width))
    if groups == width_in == width:
        return Op(f"depthwise {name}", (width,))
    raise TableError(f"got a convolution of {groups} groups, which tables do not cover; set table: null to measure it")


ONE_INPUT = ("relu", "sigmoid", "silu", "hardtanh", "hardswish", "hardsigmoid")  # bound by memory: all cost the same
TWO_INPUTS = ("add", "mul")
REDUCED = ("mean", "_adaptive_avg_pool2d", "avg_pool2d", "max_pool2d_with_indices")
FREE = ("view", "_unsafe_view", "t", "transpose", "detach", "alias", "squeeze", "unsqueeze", "expand", "empty")


class _Recorder(TorchDispatchMode):
    """Notes what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[Op] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        if name == "convolution":
            (_, width_in, side, _), (width, _, kernel, _) = args[0].shape, args[1].shape
            self.ops[conv(kernel, args[3][0], width_in, width, side, groups=args[8])] += 1
        elif name in ("addmm", "mm"):
            self.ops[Op("linear", tuple(args[-1].shape))] += 1
        elif name in (*ONE_INPUT, *TWO_INPUTS, *REDUCED):
            family = "relu" if name in ONE_INPUT else "add" if name in TWO_INPUTS else "mean"
            self.ops[Op(family, (args[0].numel() // len(args[0]),))] += 1
        elif name not in FREE:
            raise TableError(f"got a network that computes {name!r}, which tables do not cover; set table: null")
        return func(*args, **(kwargs or {}))


def operations(network: nn.Module, size: int) -> Counter[Op]:
    """The parts of a network of images, counted.

    Args:
        network: anywhere; nothing is computed.
        size: side of the images.

    Raises:
        TableError: it computes what no table covers.
    """
    recorder = _Recorder()
    shapes = folded(network).to("meta")
    with torch.no_grad(), recorder:  # under inference_mode torch hands out composite operations
        shapes(torch.empty(1, 3, size, size, device="meta"))
    return recorder.ops


def of_structure(structure: Structure, size: int, classes: int = 0) -> Iterator[Op]:
    """The same of a structure string of Zen-NAS, without its network: half a millisecond, not 200.

    Args:
        structure: of the network.
        size: side of the images.
        classes: of a classifier; 0: none.
    """
    return of_branches((branch for part in structure for branch in part.branches()), size, classes)


def of_branches(branches: Iterable[Branch], size: int, classes: int = 0, *, pools: bool = False) -> Iterator[Op]:
    """The same of a chain of branches.

    Args:
        branches: one or more.
        size: side of the images.
        classes: of a classifier; 0: none.
        pools: whether a shortcut takes means before its convolution, where there is a stride.
    """
    width = 0
    for branch in branches:
        side_in, first, last = size, branch.convs[0], branch.convs[-1]
        for c in branch.convs:
            yield conv(c.kernel, c.stride, c.width_in, c.width, size, c.groups)
            size = -(-size // c.stride)
            if c is not last:
                yield Op("relu", (c.width * size**2,))
        stride = max(c.stride for c in branch.convs)
        if branch.residual and pools and stride > 1:
            yield Op("mean", (first.width_in * side_in**2,))
            side_in, stride = size, 1
        if branch.projects:
            yield conv(1, stride, first.width_in, last.width, side_in)
        width = last.width
        if branch.residual:
            yield Op("add", (width * size**2,))
        yield Op("relu", (width * size**2,))
    yield Op("mean", (width * size**2,))
    if classes:
        yield Op("linear", (width, classes))
