"""Which of several front ends reconciles a database: one at a time leads, the others stand by.

The lead is a lock that ends with the process that holds it, so nobody has to notice a death: on PostgreSQL an advisory
lock of a session (not through a pooler that shares sessions between transactions), on SQLite, which is of one machine,
a lock on a file beside the database.

Two might still act at the same moment, when the one that leads is cut off from the database in the middle of a round.
Then the revision of the row, and the name of the attempt in Ray, see to it that nothing is submitted twice.
"""

from __future__ import annotations

import fcntl
import logging
import os

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger(__name__)

KEY = 0x6D616E7461  # "manta"; advisory locks are numbers, of one database
# A machine that vanished says no goodbye: its session ends 25 s later, not after the two hours of the system.
GOODBYE = "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"


class Lead:
    """The wish to lead, of one front end; for one thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._session: sa.Connection | None = None
        self._file: int | None = None

    def held(self) -> bool:
        """Whether this front end leads; takes the lead where nobody has it."""
        if self._engine.dialect.name == "postgresql":
            return self._session_holds()
        return self._file_holds(self._engine.url.database)

    def release(self) -> None:
        """Lets another one lead, at once."""
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _session_holds(self) -> bool:
        """Raises SQLAlchemyError while the database is away."""
        if self._session is not None:
            try:
                self._session.exec_driver_sql("SELECT 1")
                return True
            except SQLAlchemyError as error:
                logger.warning("the lead is lost with its session: %s", error)
                self._session.invalidate()
                self.release()
        session = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            session.detach()  # from the pool: a session that is closed is ended, and the lock with it
            if not session.scalar(sa.select(sa.func.pg_try_advisory_lock(KEY))):
                session.close()
                return False
            session.exec_driver_sql(GOODBYE)
        except SQLAlchemyError:
            session.close()
            raise
        self._session = session
        logger.info("this front end leads: it reconciles the jobs")
        return True

    def _file_holds(self, database: str | None) -> bool:
        if self._file is not None or database in (None, "", ":memory:"):
            return True
        file = os.open(f"{database}-lead", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        logger.info("this front end leads: it reconciles the jobs")
        return True
