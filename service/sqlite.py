"""How SQLite is used: readers beside one writer, whose turn it is by a queue."""

from __future__ import annotations

import threading
from typing import Any

import sqlalchemy as sa

WRITER_S = 60.0  # for which a thread waits for its turn, then it is SQLite's to say no


def set_up(engine: sa.Engine) -> None:
    """What each connection gets, before the first one."""
    sa.event.listen(engine, "connect", pragmas)
    _queue_writers(engine)


def pragmas(connection: Any, _: Any) -> None:
    """Readers beside a writer, waiting instead of failing, and commits that survive a power cut."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "busy_timeout=10000", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _queue_writers(engine: sa.Engine) -> None:
    """Lets the threads of this process write one after another, each when it is woken.

    SQLite has one writer at a time and no queue: others sleep and try again, and in a burst some find it taken each
    time until `busy_timeout` is over.
    """
    writer = threading.Lock()

    def before(connection: sa.Connection, _: Any, __: str, ___: Any, context: Any, ____: bool) -> None:
        writes = context is not None and (context.isinsert or context.isupdate or context.isdelete)
        if writes and not connection.info.get("writer"):
            connection.info["writer"] = writer.acquire(timeout=WRITER_S)

    def after(_: Any, record: Any) -> None:
        if record.info.pop("writer", False):
            writer.release()

    sa.event.listen(engine, "before_cursor_execute", before)
    sa.event.listen(engine, "checkin", after)  # behind the commit
