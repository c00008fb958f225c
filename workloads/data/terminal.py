"""How the data commands speak: tables and a bar on a terminal, plain lines in a pipe, errors on one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from workloads.data.shard_writer import Packed
from workloads.data.shards import DataError

MOST_LINES = 20  # of bad members on a terminal; --json has all of them


def print_packed(packed: Packed, as_json: bool) -> None:
    """Samples by split, what was left out, and where the shards are."""
    if as_json:
        typer.echo(json.dumps(asdict(packed), default=str))
        return
    print_table("split", packed.samples | {"bad": len(packed.bad)})
    print_lines("bad", packed.bad)
    for shards in packed.shards.values():
        typer.echo(packed.out / shards[0] if len(shards) == 1 else f"{packed.out / shards[0]} ... {shards[-1]}")


def print_table(head: str, rows: Mapping[str, int | str]) -> None:
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


def print_lines(head: str, lines: list[str]) -> None:
    """The first lines of a list, each after its name."""
    for line in lines[:MOST_LINES]:
        typer.echo(f"{head}\t{line}")
    if len(lines) > MOST_LINES:
        typer.echo(f"{head}\t... and {len(lines) - MOST_LINES} more; --json lists all")


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, nothing in a pipe; yields what to call for each item that is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda _: bar.advance(task)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can mend goes to standard error as one line, with exit code 1."""
    try:
        yield
    except DataError as error:
        fail(str(error))
    except OSError as error:
        fail(f"got {error}; check the path or address, the permissions, and the disk or the network")


def fail(message: str) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(1)
