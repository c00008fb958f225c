"""`manta latency-table`: what the parts of networks cost on this machine, for searches here or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workloads.data.terminal import fail, one_line_errors, progress


def latency_table(
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file; one that was not finished goes on.")],
    size: Annotated[int, typer.Option(help="Side of the images.", min=1)] = 224,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 64,
    precision: Annotated[str, typer.Option(help="fp16 or fp32 [fp16 on cuda, fp32 on cpu].", show_default=False)] = "",
    width: Annotated[list[int] | None, typer.Option(help="Channels [8, 16, 32, ... 8192].", min=1)] = None,
    kernel: Annotated[list[int] | None, typer.Option(help="Sides of kernels [1, 3, 5, 7].", min=1)] = None,
    most_macs: Annotated[float, typer.Option(help="Leave out parts of more multiply-adds for each image.")] = 2e9,
) -> None:
    """Measure a latency table: once on a device, for every search that is about it."""
    import torch

    from workloads.search.latency_grid import KERNELS, WIDTHS, check, grid, measure_table

    precision = precision or ("fp32" if device == "cpu" else "fp16")
    if precision not in ("fp16", "fp32"):
        fail(f"got precision {precision!r}, expected fp16 or fp32")
    if device not in ("cpu", "cuda"):
        fail(f"got device {device!r}, expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        fail("got device cuda on a machine without a GPU; run this where there is one, and take the file along")
    ops = list(dict.fromkeys(grid(size, batch_size, width or WIDTHS, kernel or KERNELS, most_macs)))
    with one_line_errors(), progress("measuring", len(ops)) as on_entry:
        try:
            table = measure_table(
                out,
                ops,
                size=size,
                batch_size=batch_size,
                precision="fp16" if precision == "fp16" else "fp32",
                device=device,
                on_entry=on_entry,
            )
        except ValueError as error:
            fail(str(error))
        check(table)
        table.write(out)
    for name, (added, measured) in table.checks.items():
        off = table.ratio * added / measured - 1
        typer.echo(f"{name}\tmeasured {measured:.4f} ms\tby this table {table.ratio * added:.4f} ({off:+.1%})")
    typer.echo(f"{out}\t{len(ops)} parts\t{table.conditions}")
