"""The `manta` command: the REST calls of the service, the embedded cluster, data tools, and runs without Ray.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 cancelled or stopped, 4 cluster or service not reachable.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from service import cli_estimate, cli_jobs
from service.progress import bar_on, job_progress, note_of
from service.terminal import (
    CANCELLED,
    FAILED,
    OK,
    USAGE,
    AsJson,
    Base,
    connected,
    err,
    fail,
    out,
    read_job,
    show_json,
    show_table,
)

app = typer.Typer(
    help=(__doc__ or "").replace("\n\n", "\n\n\b\n", 1), no_args_is_help=True, pretty_exceptions_enable=False
)

for command in (*cli_jobs.COMMANDS, cli_estimate.estimate):
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
def searches(name: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """Lists the architecture searches with their settings, or shows the schema of one; --json: of all."""
    with connected() as client:
        found = client.searches() if name is None else client.search(name)
    if as_json or name is not None:
        show_json(found)
    else:
        rows = [(s["name"], s["paper"], ", ".join(s["schema"]["properties"])) for s in found]
        show_table(["name", "paper", "settings"], rows)


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
    spec: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="A JobSpec, YAML or JSON; not with --replay.")
    ] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Run folder; a second call on it continues.")] = None,
    base: Base = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the folder and its mirror hold.")] = False,
    replay: Annotated[
        str | None, typer.Option(metavar="JOB", help="Run folder or job id: make --steps again, is it equal?")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="A:B", help="Of --replay: done steps, from A to B.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of --replay: JSON instead of a table.")] = False,
) -> None:
    """Runs a job in this process, without a service and without Ray. Ctrl-C checkpoints.

    With --replay it makes a part of a run again, which it leaves alone: exit code 0 equal, 1 not equal.
    """
    if replay is not None:
        if steps is None or spec is not None or out_folder is not None or fresh:
            fail("got --replay, expected --steps A:B with it, and no job, --out or --fresh", USAGE)
        _replay(replay, steps, as_json)
    if steps is not None or as_json:
        fail("got --steps or --json, expected --replay JOB with them; leave them out", USAGE)
    if spec is None or out_folder is None:
        fail("got no job or no --out, expected `manta run --local JOB.yaml --out FOLDER`", USAGE)
    if not local:
        fail("got no --local: `manta run` is for this machine; `manta submit` sends a job to the service", USAGE)
    document = read_job(spec, base)
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

        before = folder.read_record()
        try:
            code = run_local(document, out_folder, fresh=fresh, on_point=on_point)
        except ValueError as error:
            fail(error, USAGE)
        record = folder.read_record()
        if record is not None and code in (OK, CANCELLED):
            show(job(record.state, record.step, record.epoch, record.total_steps))
    if record is not None and record != before and record.reason and code != OK:  # else the log has said why
        hint = record.hint or ("the same command goes on from there" if code == CANCELLED else None)
        fail(f"{record.state}: {record.reason}" + (f" ({hint})" if hint else ""), code)
    raise typer.Exit(code)


def _replay(job: str, steps: str, as_json: bool) -> NoReturn:
    """Tells on standard error what it costs and how far it is, then whether the steps are equal."""
    from service.local_cluster import default_home
    from workloads.replay import replay
    from workloads.replay_plan import find, plan, slice_of

    try:
        todo = plan(find(job, default_home()), *slice_of(steps))
        err.print(f"trains {todo.cost}", *todo.notes, sep="\n", markup=False, highlight=False)
        bar = bar_on(err)
        bar.disable = not err.is_terminal
        with bar:
            task = bar.add_task("replaying", total=todo.last - todo.start_step, note="", ends_at=None)

            def on_point(point: dict[str, Any]) -> None:
                bar.update(task, completed=point["step"] - todo.start_step, note=note_of(point))

            report = replay(todo, default_home(), on_point)
    except ValueError as error:
        fail(error, USAGE)
    except (RuntimeError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; nothing of the replay stays", CANCELLED)
    if as_json:
        show_json(asdict(report))
    else:
        show_table(["field", "value"], report.rows(), title=f"steps {steps} of {job}")
    raise typer.Exit(OK if report.equal else FAILED)


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
    from service import cli_backup
    from service.cli_access import audit, project_app, token_app
    from service.cli_cluster import COMMANDS, cluster_app
    from service.cli_webhooks import webhook_app
    from workloads.data.commands import TOOLS, pack_app
    from workloads.search.commands import latency_table

    for command in (*COMMANDS, *cli_backup.COMMANDS, *TOOLS, latency_table):
        app.command()(command)
    app.add_typer(pack_app, name="pack")
    app.add_typer(cluster_app, name="cluster")
    app.add_typer(webhook_app, name="webhook")
    app.add_typer(token_app, name="token")
    app.add_typer(project_app, name="project")
    app.command()(audit)


def main() -> None:
    _more_commands()
    app()


if __name__ == "__main__":
    main()
