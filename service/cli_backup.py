"""`manta backup`, `manta restore`: of the installation on this machine, by its folder and its database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.terminal import AsJson, fail, out, show_json, show_table

if TYPE_CHECKING:
    from service.backup import Manifest


def backup(
    target: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also those of runs; else unfinished jobs begin anew after a restore.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Saves jobs, models, tokens and the audit log at one moment, while the service runs.

    Of shards, mirrors of checkpoints, Ray's token and the settings it holds nothing.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from service import backup as backups
    from service.backup_database import BackupError
    from service.settings import Settings

    try:
        made = backups.backup(Settings(), target.absolute(), checkpoints=checkpoints)
    except (BackupError, SQLAlchemyError, OSError) as error:
        fail(error)
    _show(made, target, as_json)
    if not as_json:
        left = "" if checkpoints else "checkpoints (--checkpoints), "
        out.print(f"not held: {left}{backups.NOT_HELD}", highlight=False, markup=False)


def restore(
    source: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What `manta backup` made.")],
    as_json: AsJson = False,
) -> None:
    """Brings a backup into an empty home and database; then start the service, which migrates and goes on."""
    from sqlalchemy.exc import SQLAlchemyError

    from service import backup as backups
    from service.backup_database import BackupError
    from service.migrate import NewerDatabase
    from service.settings import Settings

    try:
        made = backups.restore(Settings(), source.absolute())
    except (BackupError, NewerDatabase, SQLAlchemyError, OSError) as error:
        fail(error)
    _show(made, source, as_json)


def _show(manifest: Manifest, folder: Path, as_json: bool) -> None:
    if as_json:
        show_json(manifest.model_dump(exclude={"files"}) | {"files": len(manifest.files)})
        return
    facts = {"made": manifest.made_at, "revision": manifest.revision, "files": len(manifest.files)} | manifest.counts
    show_table(["what", "number"], list(facts.items()), title=str(folder))


COMMANDS = (backup, restore)
