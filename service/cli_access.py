"""`manta token`, `manta project`, `manta audit`: who may what, and who did what.

With MANTA_URL they ask that service, as an admin whose token is in MANTA_TOKEN; without it they change the database of
the installation on this machine, which takes no token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from service.principal import ALL, DEFAULT_PROJECT
from service.terminal import USAGE, AsJson, connected, err, fail, out, show_json, show_table

token_app = typer.Typer(help="Tokens of people and programs.", no_args_is_help=True)
project_app = typer.Typer(help="Projects, to which jobs, models and tokens belong.", no_args_is_help=True)


@contextmanager
def _office() -> Iterator[Any]:
    """The service of MANTA_URL, or the database of this machine."""
    if os.environ.get("MANTA_URL"):
        with connected() as client:
            yield client
        return
    from service.client import ApiError
    from service.installation import Installation
    from service.migrate import NewerDatabase
    from service.settings import Settings

    try:
        with Installation(Settings()) as installation:
            yield installation
    except (ApiError, NewerDatabase) as error:
        fail(error)


@token_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Of the person or program it is for; its jobs carry it.")],
    role: Annotated[str, typer.Option(help="viewer, submitter, operator or admin.")],
    project: Annotated[str, typer.Option(help="That it is good for.")] = DEFAULT_PROJECT,
    all_projects: Annotated[
        bool, typer.Option("--all-projects", help="It is good for all, also those to come.")
    ] = False,
    expires: Annotated[str, typer.Option(help="After 12h, 90d, or `never`.")] = "90d",
    as_json: AsJson = False,
) -> None:
    """Makes a token and prints it, this once. The first must be an admin of all projects."""
    with _office() as office:
        project, lifetime = ALL if all_projects else project, None if expires == "never" else expires
        made = office.create_token(name, role, project=project, lifetime=lifetime)
    if as_json:
        show_json(made)
        return
    until = made["expires_at"][:19] + " UTC" if made["expires_at"] else "it is revoked"
    text = f"{made['id']}: {made['role']} of {made['project']} until {until}. It is not shown again:"
    err.print(text, markup=False, highlight=False)
    out.print(made["token"], markup=False, highlight=False)


@token_app.command("list")
def list_tokens(as_json: AsJson = False) -> None:
    """Lists tokens, without their text, the newest first."""
    with _office() as office:
        found = office.tokens()
    if as_json:
        show_json(found)
        return
    columns = ["id", "name", "role", "project", "created_by", "expires_at", "revoked_at", "last_used_at"]
    rows = [[t[c][:19] if c.endswith("_at") and t[c] else t[c] for c in columns] for t in found]
    show_table([column.removesuffix("_at") for column in columns], rows)


@token_app.command()
def revoke(token_id: Annotated[str, typer.Argument(help="As `manta token list` shows it.")]) -> None:
    """Ends a token."""
    with _office() as office:
        office.revoke_token(token_id)
    out.print(f"{token_id} is revoked")


MaxGpus = Annotated[str | None, typer.Option(help="That its running jobs may have together, or `none`.")]
MaxRunning = Annotated[str | None, typer.Option(help="Jobs at a time, or `none`.")]
MaxUnfinished = Annotated[str | None, typer.Option(help="Jobs in the queue, running and paused, or `none`.")]
Share = Annotated[str | None, typer.Option(help="Of the cluster, beside those of others that wait.")]


def _quotas(**given: str | None) -> dict[str, Any]:
    """Those that were given, as the service takes them."""
    try:
        return {
            name: None if text == "none" else float(text) if "." in text else int(text)
            for name, text in given.items()
            if text is not None
        }
    except ValueError:
        fail(f"got {given}, expected numbers, or `none` for no limit", USAGE)


@project_app.command("create")
def create_project(
    name: str,
    max_gpus: MaxGpus = None,
    max_running: MaxRunning = None,
    max_unfinished: MaxUnfinished = None,
    share: Share = None,
) -> None:
    """Makes a project."""
    quotas = _quotas(max_gpus=max_gpus, max_running=max_running, max_unfinished=max_unfinished, share=share)
    with _office() as office:
        office.create_project(name, **quotas)
    out.print(name, markup=False)


@project_app.command("set")
def set_project(
    name: str,
    max_gpus: MaxGpus = None,
    max_running: MaxRunning = None,
    max_unfinished: MaxUnfinished = None,
    share: Share = None,
) -> None:
    """Sets quotas of a project; what runs already goes on."""
    quotas = _quotas(max_gpus=max_gpus, max_running=max_running, max_unfinished=max_unfinished, share=share)
    if not quotas:
        fail("got no quota, expected at least one; see --help", USAGE)
    with _office() as office:
        _show_projects([office.change_project(name, **quotas)])


@project_app.command("list")
def list_projects(as_json: AsJson = False) -> None:
    """Lists the projects, what they use, and what they may."""
    with _office() as office:
        found = office.projects()
    if as_json:
        show_json(found)
    else:
        _show_projects(found)


def _show_projects(found: list[dict[str, Any]]) -> None:
    """Each with what it uses of its quotas."""

    def of(project: dict[str, Any], name: str) -> str:
        most = project[f"max_{name}"]
        return f"{project['used'][name]:g} of {'any' if most is None else format(most, 'g')}"

    rows = [(p["name"], *(of(p, name) for name in ("gpus", "running", "unfinished")), f"{p['share']:g}") for p in found]
    show_table(["project", "GPUs", "running", "unfinished", "share"], rows)


def audit(limit: Annotated[int, typer.Option(min=1, max=500)] = 50, as_json: AsJson = False) -> None:
    """Lists who asked for which change, when, and what came of it; the newest first."""
    with _office() as office:
        found = office.audit(limit=limit)
    if as_json:
        show_json(found)
        return
    columns = ["time", "who", "project", "action", "target", "status"]
    show_table(columns, [[e[c][:19] if c == "time" else e[c] for c in columns] for e in found])
