"""Measures a latency table: every kind of part that networks of images have, over a grid of widths.

Then some published networks are measured whole, to see by how much the sum of parts is off, and to take that out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from workloads.models.genet import GENetLarge, GENetLight, GENetNormal
from workloads.models.zennet import ZenNetConfig
from workloads.search.latency import DTYPE, Precision, device_name, expect_precision, measure, placed, timed
from workloads.search.latency_ops import Op, TableError, conv, operations
from workloads.search.latency_table import LatencyTable

WIDTHS = tuple(2**i for i in range(3, 14))  # 8 to 8192
KERNELS = (1, 3, 5, 7)
MOST_MACS = 2e9
MOST_VALUES = 2**28  # in the maps of an entry: 1 GiB in fp32
SIDES = 6  # of the maps: a network divides the size of its images by 32
OFTEN = 200  # entries between two writes
CHECKED: dict[str, Callable[[], nn.Module]] = {
    "genet_light": lambda: GENetLight().build(),
    "genet_normal": lambda: GENetNormal().build(),
    "genet_large": lambda: GENetLarge().build(),
    **{
        f"zennet {name}": lambda name=name: ZenNetConfig(structure=name).build()  # type: ignore[misc]
        for name in ("cifar-1M", "imagenet-400M", "imagenet-0.1ms", "imagenet-0.2ms")
    },
}


def grid(
    size: int,
    batch_size: int,
    widths: Iterable[int] = WIDTHS,
    kernels: Iterable[int] = KERNELS,
    most_macs: float = MOST_MACS,
) -> Iterator[Op]:
    """What a table measures.

    Args:
        size: side of the images.
        batch_size: images at once.
        widths: channels; images have 3 beside.
        kernels: odd.
        most_macs: multiply-adds of an entry for each image; what is above is left out.
    """
    widths, kernels = sorted(set(widths)), sorted(set(kernels))
    side = size
    for _ in range(SIDES):
        for kernel, stride in itertools.product(kernels, (1, 2)):
            out = -(-side // stride)
            for a, b in itertools.product([3, *widths] if side == size else widths, widths):
                values = a * side**2 + b * out**2
                if a * b * (kernel * out) ** 2 <= most_macs and values * batch_size <= MOST_VALUES:
                    yield conv(kernel, stride, a, b, side)
            for a in widths:
                if kernel > 1 and 2 * a * side**2 * batch_size <= MOST_VALUES:
                    yield conv(kernel, stride, a, a, side, groups=a)
        if side == 1:
            break
        side = -(-side // 2)
    for a, b in itertools.product(widths, widths):
        yield conv(1, 1, a, b, 1)  # of squeeze-and-excitation
        yield Op("linear", (a, b))
    for i, family in itertools.product(range(14), ("relu", "add", "mean")):
        if 2 * 4**i * batch_size <= MOST_VALUES:
            yield Op(family, (4**i,))


class _Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def measure_op(op: Op, batch_size: int, precision: Precision, device: torch.device) -> float:
    """Milliseconds per image of a part, on random maps."""
    kind, *words = op.family.split(" ")
    layer: nn.Module
    shape: tuple[int, ...]
    if kind in ("conv", "depthwise"):
        kernel, stride, side = int(words[0].split("x")[0]), int(words[2]), int(words[4])
        width_in, width = op.sizes[0], op.sizes[-1]
        groups = width if kind == "depthwise" else 1
        layer, shape = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups), (width_in, side, side)
    elif kind == "linear":
        layer, shape = nn.Linear(op.sizes[0], op.sizes[1]), op.sizes[:1]
    else:
        layer = {"relu": nn.ReLU(), "add": _Sum(), "mean": _Mean()}[kind]
        shape = (op.sizes[0] // 16, 4, 4) if op.sizes[0] >= 16 else (op.sizes[0], 1, 1)
    layer = placed(layer, device, precision)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch_size, *shape, generator=generator, device=device, dtype=DTYPE[precision])
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return timed(lambda: layer(x), device) / batch_size


def measure_table(
    out: Path,
    ops: Iterable[Op],
    *,
    size: int,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    on_entry: Callable[[str], object] = str,
    measure_op: Callable[[Op, int, Precision, torch.device], float] = measure_op,
) -> LatencyTable:
    """Measures what a table does not hold yet, and writes it.

    Args:
        out: JSON file; one that is there, of the same conditions, goes on.
        ops: what to measure; `grid` has what networks need.
        size: side of the images.
        batch_size: images at once.
        precision: of weights and maps.
        device: to measure on.
        on_entry: called with each part that is done.
        measure_op: measures a part.

    Raises:
        TableError: the file holds a table of other conditions.
        ValueError: the device does not do that precision.
    """
    device = torch.device(device)
    expect_precision(precision, device)
    table = LatencyTable(
        on="cuda" if device.type == "cuda" else "cpu",
        device=device_name(device),
        torch=torch.__version__,
        size=size,
        batch_size=batch_size,
        precision=precision,
        ms={},
    )
    if out.exists():
        known = LatencyTable.read(out)
        if known.conditions != table.conditions:
            raise TableError(
                f"got {out}, which was measured on {known.conditions}, expected {table.conditions}; write another file"
            )
        table = known
    for i, op in enumerate(dict.fromkeys(ops)):
        of_family = table.ms.setdefault(op.family, {})
        key = ",".join(map(str, op.sizes))
        if key not in of_family:
            of_family[key] = measure_op(op, batch_size, precision, device)
        on_entry(str(op))
        if i % OFTEN == 0:
            table.write(out)
    table.write(out)
    return table


def check(table: LatencyTable, measure: Callable[..., float] = measure) -> None:
    """Notes in a table what published networks take, by its sum and by measurement; those that it does not cover not.

    Args:
        table: that was measured on this machine.
        measure: measures a network.
    """
    for name, build in CHECKED.items():
        with torch.device("meta"):
            network = build()
        try:
            added = table.added(operations(network, table.size))
        except TableError:
            continue
        conditions = {"size": table.size, "batch_size": table.batch_size, "precision": table.precision}
        table.checks[name] = added, measure(network, device=table.on, **conditions)
