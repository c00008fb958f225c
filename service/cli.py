"""The `manta` command: the REST calls of the service, the embedded cluster, data tools, and runs without Ray.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 cancelled or stopped, 4 cluster or service not reachable.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from service.terminal import (
    CANCELLED,
    FAILED,
    OK,
    UNREACHABLE,
    USAGE,
    fail,
    follow,
    job_progress,
    out,
    show_json,
    show_table,
)

app = typer.Typer(
    help=(__doc__ or "").replace("\n\n", "\n\n\b\n", 1), no_args_is_help=True, pretty_exceptions_enable=False
)

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
JobId = Annotated[str, typer.Argument(help="As `manta jobs` lists it.")]
Spec = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JobSpec, YAML or JSON.")]
Images = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)]


@app.callback()
def main_options(
    home: Annotated[Path | None, typer.Option(envvar="MANTA_HOME", help="Folder of the installation.")] = None,
) -> None:
    if home is not None:
        os.environ["MANTA_HOME"] = str(home.absolute())


@contextmanager
def _service() -> Iterator[Any]:
    """A client of the service; its refusals, and a cluster that is not there, become one message and an exit code."""
    from cluster.embedded import ClusterError, running
    from service.client import ApiError, Client
    from service.local_cluster import default_home

    try:
        url = os.environ.get("MANTA_URL") or running(default_home()).url
        with Client(url) as client:
            yield client
    except ClusterError as error:
        fail(error, UNREACHABLE)
    except ApiError as error:
        fail(error, UNREACHABLE if error.status in (0, 503) else FAILED)


def _read_spec(path: Path) -> Any:
    from workloads.spec import read_spec

    try:
        return read_spec(path).absolute(path.absolute().parent)
    except ValueError as error:
        fail(_readable(error), USAGE)


def _readable(error: ValueError) -> str:
    """A pydantic error by our own sentences."""
    from pydantic import ValidationError

    from workloads.catalog import problems_of
    from workloads.spec import JobSpec

    if not isinstance(error, ValidationError):
        return str(error)
    return "\n".join(f"{'.'.join(map(str, loc))}: {text}" for loc, text in problems_of(error, JobSpec))


@app.command()
def submit(
    spec: Spec,
    stay: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submits a job. Relative shard paths are taken from the folder of the file."""
    document = _read_spec(spec).model_dump(mode="json")
    with _service() as client:
        job = client.submit(document)
        if as_json and not stay:
            show_json(job)
        elif not stay:
            out.print(f"{job['id']} {job['state']}")
        if stay:
            _follow(client, job["id"], as_json)


def _follow(client: Any, job_id: str, as_json: bool) -> None:
    """Shows progress until the end; Ctrl-C detaches."""
    try:
        job = follow(client, job_id)
    except KeyboardInterrupt:
        fail(
            f"\ndetached: {job_id} goes on; `manta cancel {job_id}` ends it, `manta logs -f {job_id}` follows it",
            CANCELLED,
        )
    if as_json:
        show_json(job)
    else:
        _print_job(job)
    raise typer.Exit({"SUCCEEDED": OK, "CANCELLED": CANCELLED}.get(job["state"], FAILED))


def _print_job(job: dict[str, Any]) -> None:
    progress = job["progress"]
    rows = [
        ("id", job["id"]),
        ("name", job["name"]),
        ("state", job["state"]),
        ("reason", job["reason"]),
        ("hint", job["hint"]),
        ("method", job["method"]),
        ("progress", f"step {progress['step']} of {progress['total_steps']}, epoch {progress['epoch']}"),
        ("attempt", job["attempt"]),
        ("created", job["created_at"]),
        ("finished", job["finished_at"]),
        ("skipped samples", len(job["skipped"]) or None),
        ("models", ", ".join(job["models"]) or None),
    ]
    for result in job["evaluations"]:
        values = ", ".join(f"{who} {value['mean']:.3f}" for who, value in result["results"].items())
        rows.append((result["label"], values))
    show_table(["field", "value"], [row for row in rows if row[1] is not None])


@app.command()
def jobs(limit: Annotated[int, typer.Option(min=1)] = 20, as_json: AsJson = False) -> None:
    """Lists jobs, the newest first."""
    with _service() as client:
        found = client.jobs(limit=limit)
    if as_json:
        show_json(found)
        return
    rows = []
    for j in found:
        progress = j["progress"]
        rows.append([j["id"], j["name"], j["method"], j["state"], progress["step"], progress["total_steps"]])
        rows[-1] += [j["created_at"][:19], j["reason"]]
    show_table(["id", "name", "method", "state", "step", "of", "created", "reason"], rows)


@app.command()
def job(job_id: JobId, as_json: AsJson = False) -> None:
    """Shows one job."""
    with _service() as client:
        found = client.job(job_id)
    if as_json:
        show_json(found)
    else:
        _print_job(found)


@app.command()
def logs(job_id: JobId, follow: Annotated[bool, typer.Option("--follow", "-f")] = False) -> None:
    """Prints the log of a job."""
    with _service() as client:
        try:
            for line in client.follow_logs(job_id) if follow else client.logs(job_id).splitlines():
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(OK) from None


@app.command()
def metrics(job_id: JobId, as_json: AsJson = False) -> None:
    """Prints the curve of a job."""
    with _service() as client:
        points = client.metrics(job_id)
    if as_json:
        show_json(points)
        return
    columns = list(dict.fromkeys(key for point in points for key in point))
    show_table(
        columns, [[f"{p.get(c):.6g}" if isinstance(p.get(c), float) else p.get(c) for c in columns] for p in points]
    )


@app.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Asks a job to write a last checkpoint and end."""
    with _service() as client:
        found = client.cancel(job_id)
    if as_json:
        show_json(found)
    else:
        out.print(f"{found['id']} {found['state']}")


@app.command()
def methods(name: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """Lists the methods, or shows the schema of one."""
    with _service() as client:
        found = client.methods() if name is None else client.method(name)
    if as_json or name is not None:
        show_json(found)
    else:
        show_table(["name", "paper"], [(m["name"], m["paper"]) for m in found])


@app.command()
def models(name: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """Lists the registered models, or shows one."""
    with _service() as client:
        found = client.models() if name is None else client.model(name)
    if as_json or name is not None:
        show_json(found)
    else:
        columns = ["name", "version", "kind", "job_id", "created_at"]
        show_table(columns, [[m[column] for column in columns] for m in found])


@app.command()
def deploy(name: str, version: Annotated[int | None, typer.Option()] = None, as_json: AsJson = False) -> None:
    """Serves a registered model and returns when it answers."""
    with _service() as client:
        found = client.deploy(name, version=version, wait_s=120)
    if as_json:
        show_json(found)
    else:
        out.print(f"{found['model']} {found['state']}")


@app.command()
def undeploy(name: str) -> None:
    """Ends the serving of a model."""
    with _service() as client:
        client.undeploy(name)
    out.print(f"{name} is no longer served")


@app.command()
def predict(name: str, images: Images, as_json: AsJson = False) -> None:
    """Asks a deployed classifier about image files."""
    with _service() as client:
        found = client.predict(name, [path.read_bytes() for path in images])
    if as_json:
        show_json(found)
    else:
        rows = [
            (path, o["label"], f"{o['probabilities'][o['label']]:.3f}") for path, o in zip(images, found, strict=True)
        ]
        show_table(["image", "label", "probability"], rows)


@app.command()
def embed(name: str, images: Images) -> None:
    """Prints the features of image files, a JSON list each."""
    with _service() as client:
        for features in client.embed(name, [path.read_bytes() for path in images]):
            sys.stdout.write(json.dumps(features) + "\n")


@app.command()
def run(
    spec: Spec,
    out_folder: Annotated[Path, typer.Option("--out", help="Run folder; a second call on it continues.")],
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the folder holds.")] = False,
) -> None:
    """Runs a job in this process, without a service and without Ray. Ctrl-C checkpoints."""
    if not local:
        fail("got no --local: `manta run` is for this machine; `manta submit` sends a job to the service", USAGE)
    document = _read_spec(spec)
    import logging

    from workloads.record import RunFolder
    from workloads.run import run_local

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    folder = RunFolder(out_folder.absolute())
    job = {"id": document.name, "state": "RUNNING", "spec": document.model_dump()}
    with job_progress() as show:

        def on_point(point: dict[str, Any]) -> None:
            progress = {
                "step": point["step"],
                "epoch": point["epoch"],
                "total_steps": int(folder.total_steps.read_text()),
            }
            show(job | {"progress": progress, "evaluations": folder.read_evaluations()}, point)

        try:
            code = run_local(document, out_folder, fresh=fresh, on_point=on_point)
        except ValueError as error:
            fail(error, USAGE)
    record = folder.read_record()
    if record is not None and code != OK:
        fail(f"{record.state}: {record.reason}" + (f" ({record.hint})" if record.hint else ""), code)
    raise typer.Exit(code)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where data, report and the demo's own home go.")] = Path(
        "demo"
    ),
) -> None:
    """The main job end to end on real digits, in minutes: shards, training, evaluation, serving, a report."""
    from service.demo import run_demo

    raise typer.Exit(run_demo(folder))


def _more_commands() -> None:
    """Those of the cluster, and `pack`, `inspect` and other tools that live with the data."""
    from service.cli_cluster import COMMANDS
    from workloads.data.commands import TOOLS, pack_app

    for command in (*COMMANDS, *TOOLS):
        app.command()(command)
    app.add_typer(pack_app, name="pack")


def main() -> None:
    _more_commands()
    app()


if __name__ == "__main__":
    main()
