"""Brings a database to the schema of this version, by Alembic's migrations; applied when the service starts."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import alembic.command
import alembic.config
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import OperationalError

from service import postgres

logger = logging.getLogger(__name__)

PAUSE_S, MAX_PAUSE_S = 0.5, 8.0  # between tries to open a database that is away
MIGRATION = 0x6D6967  # "mig": the advisory lock of migrations


class NewerDatabase(RuntimeError):
    """The schema is of a version of Manta that this one does not know."""


def migrate(engine: sa.Engine, to: str | None = None) -> None:
    """Brings the schema to the newest version, or leaves it as it was; of front ends that start together one does it.

    Args:
        engine: of the database.
        to: another revision, also an earlier one; what that cannot hold is lost.

    Raises:
        NewerDatabase: a newer version of Manta was here.
    """
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect() as connection:
        if sqlite := engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")  # a table is altered by dropping and renaming it
            connection.commit()
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # Python's driver begins none for a change of the schema
        else:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION)))
        revision = _known_revision(connection, config)
        config.attributes["connection"] = connection
        back = to is not None and revision is not None and to < revision
        (alembic.command.downgrade if back else alembic.command.upgrade)(config, to or "head")
        connection.commit()
        if sqlite:
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")


def migrate_when_there(engine: sa.Engine, patience_s: float) -> None:
    """`migrate` on a server that may be about to start."""
    pause_s, ends = PAUSE_S, time.monotonic() + patience_s
    while True:
        try:
            return migrate(engine)
        except OperationalError as error:
            if not postgres.may_pass(error) or time.monotonic() + pause_s > ends:
                raise
            where = engine.url.render_as_string(hide_password=True)
            logger.warning("waits for the database %s (%s); again in %s s", where, error.orig, pause_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)


def revision_of(connection: sa.Connection) -> str | None:
    """Of the schema; None: the database has none of ours."""
    return MigrationContext.configure(connection).get_current_revision()


def _known_revision(connection: sa.Connection, config: alembic.config.Config) -> str | None:
    revision = revision_of(connection)
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    if revision is not None and revision not in known:
        raise NewerDatabase(
            f"got a database of revision {revision}, expected at most {known[0]}: a newer Manta was here; upgrade this "
            "one, or restore the backup from before"
        )
    return revision
