"""`manta up`, `down`, `serve`, `doctor`, `env`: the installation on this machine."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from cluster import embedded
from cluster.embedded import ClusterError
from service import local_cluster
from service.local_cluster import default_home
from service.terminal import CANCELLED, FAILED, UNREACHABLE, fail, out, show_json, show_table

Host = Annotated[str | None, typer.Option(help="Address it listens on [127.0.0.1]; others need a token first.")]
NodesAt = Annotated[str, typer.Option(metavar="IP", help="Address of this machine at which others may join it.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


def up(
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that jobs may use [all].")] = None,
    port: Annotated[int | None, typer.Option(help="Of the REST API [a free one].")] = None,
    host: Host = None,
    nodes_at: NodesAt = embedded.LOOPBACK,
) -> None:
    """Starts a Ray head and the service on this machine, in the background, on loopback."""
    try:
        with local_cluster.signals_raise():
            head = local_cluster.up(default_home(), ip=nodes_at, num_cpus=cpus, host=host, http_port=port)
    except ClusterError as error:
        fail(error, UNREACHABLE)
    except KeyboardInterrupt:
        fail("interrupted; what was started is stopped", CANCELLED)
    out.print(f"ready: {head.url}  docs: {head.url}/docs  (`manta down` ends it)")


def down() -> None:
    """Ends what `manta up` started, and nothing else."""
    head = embedded.read(default_home())
    if head is None:
        out.print(f"nothing runs for {default_home()}")
        return
    embedded.stop(head)
    out.print("ended")


def serve(
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that jobs may use [all].")] = None,
    port: Annotated[int, typer.Option(help="Of the REST API.")] = 8000,
    host: Host = None,
    nodes_at: NodesAt = embedded.LOOPBACK,
) -> None:
    """`up` in the foreground: Ctrl-C ends it; jobs continue from their checkpoints at the next start."""
    try:
        options = {"ip": nodes_at, "num_cpus": cpus, "host": host, "http_port": port}
        with local_cluster.temporary(default_home(), **options) as head:
            out.print(f"ready: {head.url}  docs: {head.url}/docs  (Ctrl-C ends it)")
            signal.pause()
    except ClusterError as error:
        fail(error, UNREACHABLE)
    except KeyboardInterrupt:
        out.print("ended")


def doctor(as_json: AsJson = False) -> None:
    """Says what is wrong with this installation and its cluster, within seconds."""
    from cluster.doctor import examine

    findings = examine(default_home())
    if as_json:
        show_json([finding.model_dump() for finding in findings])
    else:
        marks = [("ok" if f.ok else "WRONG", f.name, f.detail, "" if f.ok else f.hint) for f in findings]
        show_table(["", "what", "found", "what to do"], marks)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


def env() -> None:
    """Prints what a shell needs for `ray` commands: eval "$(manta env)"."""
    try:
        sys.stdout.write(embedded.shell_exports(embedded.running(default_home())) + "\n")
    except ClusterError as error:
        fail(error, UNREACHABLE)


cluster_app = typer.Typer(help="Machines of a cluster.", no_args_is_help=True)


@cluster_app.callback()
def _group() -> None:
    """Keeps `add-node` a command of its own, although it is the only one."""


@cluster_app.command("add-node")
def add_node(
    cpus: Annotated[int | None, typer.Option(min=0, help="CPUs that jobs may use here [all].")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that jobs may use here [all].")] = None,
    custom: Annotated[list[str] | None, typer.Option("--resource", metavar="NAME=N", help="Of another kind.")] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the head.")] = 60,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for last checkpoints after SIGTERM or Ctrl-C.")] = 120,
) -> None:
    """Joins this machine, in the foreground, to the head that another one started by `manta up --nodes-at IP`.

    Both must see the same home folder: it says where the head is and holds its token. Jobs that ask for a
    `--resource` by `resources.custom_per_worker` run on nodes that give it out.
    """
    from cluster import nodes

    try:
        amounts = nodes.custom_resources(custom or [])
        nodes.join(default_home(), cpus=cpus, gpus=gpus, wait_s=wait, drain_s=drain, custom=amounts)
    except ClusterError as error:
        fail(error, UNREACHABLE)


COMMANDS = (up, down, serve, doctor, env)
