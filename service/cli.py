"""The `manta` command: the REST calls of the service, the embedded cluster, data tools, and runs without Ray.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 cancelled or stopped, 4 cluster or service not reachable.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from service import cli_jobs
from service.progress import job_progress
from service.terminal import (
    CANCELLED,
    OK,
    USAGE,
    AsJson,
    Spec,
    connected,
    fail,
    out,
    read_job,
    show_json,
    show_table,
)

app = typer.Typer(
    help=(__doc__ or "").replace("\n\n", "\n\n\b\n", 1), no_args_is_help=True, pretty_exceptions_enable=False
)

for command in cli_jobs.COMMANDS:
    app.command()(command)

Images = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)]


@app.callback()
def main_options(
    home: Annotated[Path | None, typer.Option(envvar="MANTA_HOME", help="Folder of the installation.")] = None,
) -> None:
    if home is not None:
        os.environ["MANTA_HOME"] = str(home.absolute())


@app.command()
def methods(name: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """Lists the methods, or shows the schema of one."""
    with connected() as client:
        found = client.methods() if name is None else client.method(name)
    if as_json or name is not None:
        show_json(found)
    else:
        show_table(["name", "paper"], [(m["name"], m["paper"]) for m in found])


@app.command()
def models(name: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """Lists the registered models, or shows one."""
    with connected() as client:
        found = client.models() if name is None else client.model(name)
    if as_json or name is not None:
        show_json(found)
    else:
        columns = ["name", "version", "kind", "job_id", "created_at"]
        show_table(columns, [[m[column] for column in columns] for m in found])


@app.command()
def deploy(name: str, version: Annotated[int | None, typer.Option()] = None, as_json: AsJson = False) -> None:
    """Serves a registered model and returns when it answers."""
    with connected() as client:
        found = client.deploy(name, version=version, wait_s=120)
    if as_json:
        show_json(found)
    else:
        out.print(f"{found['model']} {found['state']}")


@app.command()
def undeploy(name: str) -> None:
    """Ends the serving of a model."""
    with connected() as client:
        client.undeploy(name)
    out.print(f"{name} is no longer served")


@app.command()
def predict(name: str, images: Images, as_json: AsJson = False) -> None:
    """Asks a deployed classifier about image files."""
    with connected() as client:
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
    with connected() as client:
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
    document = read_job(spec)
    import logging

    from workloads.record import RunFolder
    from workloads.run import run_local

    folder, as_sent = RunFolder(out_folder.absolute()), document.model_dump()

    def job(state: str, step: int, epoch: int, total_steps: int) -> dict[str, Any]:
        progress = {"step": step, "epoch": epoch, "total_steps": total_steps}
        known = {"id": document.name, "spec": as_sent, "evaluations": folder.read_evaluations()}
        return {"state": state, "progress": progress, **known}

    with job_progress() as show:
        # in here, where standard error stands above the bar
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

        def on_point(point: dict[str, Any]) -> None:
            show(job("RUNNING", point["step"], point["epoch"], int(folder.total_steps.read_text())), point)

        try:
            code = run_local(document, out_folder, fresh=fresh, on_point=on_point)
        except ValueError as error:
            fail(error, USAGE)
        record = folder.read_record()
        if record is not None and code in (OK, CANCELLED):
            show(job(record.state, record.step, record.epoch, record.total_steps))
    if record is not None and record.reason and code != OK:
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
