"""How the `manta` command talks to the service, and to people: tables, bars and colours, or plain lines in a pipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Base = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Where relative paths start [the folder of the file].")
]
Spec = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JobSpec, YAML or JSON.")]

OK, FAILED, USAGE, CANCELLED, UNREACHABLE = 0, 1, 2, 3, 4


def fail(message: object, code: int = FAILED) -> NoReturn:
    """One message on standard error, and the exit code."""
    err.print(str(message), style="red", markup=False, highlight=False)
    raise typer.Exit(code)


@contextmanager
def connected() -> Iterator[Any]:
    """A client of the service; its refusals, and a cluster that is not there, become one message and an exit code."""
    from cluster.embedded import ClusterError, running
    from service.client import ApiError, Client
    from service.local_cluster import default_home

    try:
        url = os.environ.get("MANTA_URL") or running(default_home()).url
        token, project = os.environ.get("MANTA_TOKEN"), os.environ.get("MANTA_PROJECT")
        with Client(url, token=token, project=project) as client:
            yield client
    except ClusterError as error:
        fail(error, UNREACHABLE)
    except ApiError as error:
        fail(error, UNREACHABLE if error.status in (0, 503) else FAILED)


def read_job(path: Path, base: Path | None = None) -> Any:
    """The JobSpec of a file, its relative paths taken from `base` or its own folder; a wrong one ends the command."""
    from workloads.spec_any import read_spec

    try:
        return read_spec(path).absolute((base or path.parent).absolute())
    except ValueError as error:
        fail(_readable(error), USAGE)


def read_entry(path: Path, base: Path | None = None) -> Any:
    """`read_job`, or what a file says that is to be deployed."""
    from workloads.spec_any import read_document
    from workloads.spec_deploy import DeploySpec, is_deploy

    try:
        document = read_document(path)
        return DeploySpec.model_validate(document) if is_deploy(document) else read_job(path, base)
    except ValueError as error:
        fail(_readable(error), USAGE)


def _readable(error: ValueError) -> str:
    """A pydantic error by our own sentences."""
    from pydantic import ValidationError

    from workloads.catalog import problems_of
    from workloads.spec import JobSpec
    from workloads.spec_deploy import DeploySpec
    from workloads.spec_search import SearchSpec

    if not isinstance(error, ValidationError):
        return str(error)
    spec = next((kind for kind in (SearchSpec, DeploySpec) if kind.__name__ == error.title), JobSpec)
    return "\n".join(f"{'.'.join(map(str, loc))}: {text}" for loc, text in problems_of(error, spec))


def show_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on a terminal; tab-separated lines in a pipe."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not out.is_terminal:
        for row in [list(columns), *cells]:
            sys.stdout.write("\t".join(row) + "\n")
        return
    table = Table(*columns, title=title)
    for row in cells:
        table.add_row(*row)
    out.print(table)
