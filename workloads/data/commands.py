"""`manta pack` and `manta inspect`: the data side of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from workloads.data.decode import ImageError, decode
from workloads.data.manifest import Manifest, open_manifest
from workloads.data.shards import DataError, expand

DECODE_CHUNK = 256  # samples that `inspect --decode` holds at a time
MOST_LINES = 20  # of bad members on a terminal; --json has all of them

pack_app = typer.Typer(help="Write WebDataset shards and their manifest.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", "-o", help="New folder for shards, classes.txt and manifests.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it holds nothing but packed shards.")]
PerShard = Annotated[int, typer.Option("--samples-per-shard", min=1)]


@pack_app.command("digits")
def pack_digits_command(out: Out, as_json: AsJson = False, force: Force = False) -> None:
    """The handwritten digits of scikit-learn, 32x32: train 1437, test 360."""
    from workloads.data.pack import pack_digits

    with _one_line_errors():
        _print_packed(pack_digits(out, force=force), as_json)


@pack_app.command("folder")
def pack_folder_command(
    folder: Path, out: Out, samples_per_shard: PerShard = 1000, as_json: AsJson = False, force: Force = False
) -> None:
    """Images in FOLDER; sub-folders are classes, or splits (train, val, test) that hold class folders."""
    from workloads.data.pack import pack_folder

    with _one_line_errors(), _progress("packing", None) as on_sample:
        packed = pack_folder(folder, out, samples_per_shard=samples_per_shard, force=force, on_sample=on_sample)
    _print_packed(packed, as_json)


@pack_app.command("csv")
def pack_csv_command(
    file: Path,
    out: Out,
    image_column: Annotated[str, typer.Option(help="Column with paths of images.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column with class names; '' for no labels.")] = "label",
    root: Annotated[Path | None, typer.Option(help="Where relative paths start [the folder of FILE].")] = None,
    samples_per_shard: PerShard = 1000,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Images named in a CSV FILE with a header."""
    from workloads.data.pack import pack_csv

    with _one_line_errors(), _progress("packing", None) as on_sample:
        packed = pack_csv(
            file,
            out,
            image_column=image_column,
            label_column=label_column or None,
            root=root,
            samples_per_shard=samples_per_shard,
            force=force,
            on_sample=on_sample,
        )
    _print_packed(packed, as_json)


def inspect(
    pattern: Annotated[list[str], typer.Argument(help="Shards: paths, globs or brace patterns, quoted.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Scan again, whatever manifest is kept.")] = False,
    decode_all: Annotated[bool, typer.Option("--decode", help="Decode every image and list the bad ones.")] = False,
    as_json: AsJson = False,
) -> None:
    """What shards hold: samples, bytes, classes, and what cannot be used."""
    with _one_line_errors():
        with _progress("scanning", len(expand(pattern))) as on_shard:
            manifest = open_manifest(pattern, rebuild=rebuild, on_shard=on_shard)
        counts = np.bincount(manifest.label[manifest.label >= 0], minlength=manifest.num_classes).tolist()
        report: dict[str, Any] = {
            "samples": len(manifest),
            "bytes": sum(manifest.shard_bytes),
            "classes": dict(zip(manifest.classes, counts, strict=True)),
            "shards": list(manifest.shards),
            "quarantined": manifest.quarantined,
            "content_hash": manifest.content_hash,
        }
        if decode_all:
            report["bad"] = _decode_all(manifest)
    if as_json:
        typer.echo(json.dumps(report))
        return
    lines = {name: value for name, value in report.items() if isinstance(value, int | str)}
    lines |= {"shards": len(manifest.shards), "classes": len(manifest.classes)}
    lines |= {name: len(report[name]) for name in ("quarantined", "bad") if name in report}
    _print_table("", lines)
    if manifest.classes:
        _print_table("class", report["classes"])
    for name in ("quarantined", "bad"):
        _print_lines(name, report.get(name, []))


def _decode_all(manifest: Manifest) -> list[str]:
    """`file: member at offset N: why` of each image that cannot be decoded."""
    from workloads.data.ranged import read_images

    bad = []
    with _progress("decoding", len(manifest)) as on_sample:
        for start in range(0, len(manifest), DECODE_CHUNK):
            rows = np.arange(start, min(start + DECODE_CHUNK, len(manifest)))
            for row, data in zip(rows, read_images(manifest, rows), strict=True):
                try:
                    decode(data)
                except ImageError as error:
                    bad.append(f"{manifest.where(int(row))}: {error}")
                on_sample(manifest.keys[row])
    return bad


def _print_packed(packed: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(packed), default=str))
        return
    _print_table("split", {name: count for name, count in packed.samples.items()} | {"bad": len(packed.bad)})
    _print_lines("bad", packed.bad)
    for shards in packed.shards.values():
        typer.echo(packed.out / shards[0] if len(shards) == 1 else f"{packed.out / shards[0]} ... {shards[-1]}")


def _print_table(head: str, rows: dict[str, int | str]) -> None:
    """A table on a terminal, lines of `head name value` with tabs between in a pipe."""
    console = Console()
    if not console.is_terminal:
        for name, value in rows.items():
            typer.echo("\t".join([head, name, str(value)][not head :]))
        return
    table = Table(head, "", show_header=bool(head), box=None)
    table.columns[1].justify = "right"
    for name, value in rows.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    console.print(table)


def _print_lines(head: str, lines: list[str]) -> None:
    for line in lines[:MOST_LINES]:
        typer.echo(f"{head}\t{line}")
    if len(lines) > MOST_LINES:
        typer.echo(f"{head}\t... and {len(lines) - MOST_LINES} more; --json lists all")


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, nothing in a pipe; yields what to call for each item that is done."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda _: bar.advance(task)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"got {error}; check the disk and the permissions")


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(1)
