"""The database of a backup: all rows at one moment, as an SQLite file, whichever database they came from.

So a backup needs no tools of PostgreSQL, of the right version, where it is made; and an installation moves from SQLite
to PostgreSQL by a backup and a restore. The schema stays at its revision: the service that starts on it migrates.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from service.migrate import migrate, revision_of

ROWS = 1000  # in memory at once
VERSION_TABLE = "alembic_version"


class BackupError(RuntimeError):
    """A backup that cannot be made, is damaged, or would overwrite something."""


@dataclass(frozen=True)
class Contents:
    """Of a database: the revision of its schema, and the number of rows of each table."""

    revision: str
    counts: dict[str, int]


def save(url: str, file: Path) -> None:
    """Writes what the database holds at this moment into a new SQLite file, while others read and write it.

    Raises:
        BackupError: there is no database of ours.
    """
    if path := _sqlite_path(url):
        if not path.exists():
            raise BackupError(f"got {path}, which does not exist, expected the database; is --home right?")
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(file)) as target:
            source.backup(target)
        return
    with _connected(url, isolation_level="REPEATABLE READ") as source:  # one snapshot for all tables
        revision = revision_of(source)
        if revision is None:
            raise BackupError("got a database without tables of Manta, expected one; is MANTA_DATABASE_URL right?")
        with _connected(f"sqlite:///{file}") as target:
            migrate(target.engine, revision)
            _copy(source, target)
            target.commit()


def load(file: Path, url: str) -> None:
    """Puts the rows of the file into an empty database.

    Raises:
        BackupError: it is not empty.
    """
    expect_empty(url)
    if path := _sqlite_path(url):
        scratch = path.with_name(f".{path.name}.tmp")
        scratch.unlink(missing_ok=True)
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(scratch)) as target:
            source.backup(target)
        scratch.rename(path)
        return
    with _connected(f"sqlite:///{file}") as source, _connected(url) as target:
        migrate(target.engine, revision_of(source))
        _copy(source, target)
        _continue_sequences(target)
        target.commit()


def expect_empty(url: str) -> None:
    """Raises BackupError where the database holds something."""
    if path := _sqlite_path(url):
        if path.exists():
            raise BackupError(f"got {path}, which exists, expected none; move it away, or restore into another home")
        return
    with _connected(url) as connection:
        if tables := sa.inspect(connection).get_table_names():
            raise BackupError(
                f"got a database with {len(tables)} tables ({tables[0]}, ...), expected an empty one; create it by "
                "`createdb` and name it in MANTA_DATABASE_URL"
            )


def contents(url: str) -> Contents:
    """What a database holds.

    Raises:
        BackupError: it is none of ours.
    """
    with _connected(url) as connection:
        revision = revision_of(connection)
        if revision is None:
            raise BackupError("got a database without tables of Manta")
        count = sa.select(sa.func.count())
        tables = _tables(connection)
        return Contents(revision, {t.name: connection.scalar(count.select_from(t)) or 0 for t in tables})


def check(file: Path) -> None:
    """Raises BackupError where the SQLite file is damaged."""
    try:
        with closing(sqlite3.connect(file)) as connection:
            said = [row[0] for row in connection.execute("PRAGMA integrity_check")]
            orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
    except sqlite3.DatabaseError as error:
        raise BackupError(f"got {file}, which is no database: {error}") from error
    if said != ["ok"] or orphans:
        raise BackupError(f"got {file}, which is damaged: {said[0]}, {len(orphans)} rows without their parents")


def rows(file: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(statement).fetchall()


def _sqlite_path(url: str) -> Path | None:
    """None: it is another database."""
    parsed = sa.make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


@contextmanager
def _connected(url: str, **options: Any) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url, hide_parameters=True, **options)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _tables(connection: sa.Connection) -> list[sa.Table]:
    """As they are at its revision, parents first; their types are those of any database."""
    metadata = sa.MetaData()

    @sa.event.listens_for(metadata, "column_reflect")
    def _generic(_: object, __: object, column: Any) -> None:
        column["type"] = column["type"].as_generic()

    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != VERSION_TABLE]


def _copy(source: sa.Connection, target: sa.Connection) -> None:
    tables = _tables(source)
    for table in reversed(tables):
        target.execute(table.delete())  # what migrations have put in
    for table in tables:
        found = source.execution_options(yield_per=ROWS).execute(sa.select(table))
        for batch in found.mappings().partitions(ROWS):
            target.execute(table.insert(), [dict(row) for row in batch])


def _continue_sequences(target: sa.Connection) -> None:
    """PostgreSQL numbers new rows from where the copied ones end."""
    for table in _tables(target):
        (key, *_) = table.primary_key.columns
        sequence = target.scalar(sa.select(sa.func.pg_get_serial_sequence(table.name, key.name)))
        last = target.scalar(sa.select(sa.func.max(key)))
        if sequence is not None and last is not None:
            target.execute(sa.select(sa.func.setval(sequence, last)))
