"""Connections to PostgreSQL on which nothing waits for ever, whatever hangs: the network, the server, a lock.

The server ends a statement that takes too long, the system of this machine a connection whose packets nobody
acknowledges. A server that is stopped or waits for its disk does neither: then the connection gives up by itself.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import sqlalchemy as sa

CONNECT_S = 5
STATEMENT_S = 15
SILENCE_S = 20.0  # of a server that is asked something: longer than a statement may take
POOL_S = 5.0  # for which a session waits for a connection, of which there are few
# Of libpq; what stands in the URL goes before.
NETWORK = {
    "connect_timeout": CONNECT_S,
    "tcp_user_timeout": 10_000,  # ms
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
# Of an address that stays wrong; whatever else keeps a server from taking connections may pass.
_WRONG = (
    "authentication failed",
    "no password supplied",
    "does not exist",
    "no pg_hba.conf entry",
    "Name or service not known",
    "certificate",
    "SSL",
)


def bound(engine: sa.Engine) -> None:
    """Lets the engine make such connections."""
    import psycopg
    from psycopg import errors

    class Connection(psycopg.Connection[Any]):
        def wait(self, gen: Generator[Any, Any, Any], *words: Any, **more: Any) -> Any:
            """Runs what waits for the server; it is resumed ten times a second, or when there is something to read."""
            return super().wait(self._bounded(gen), *words, **more)

        def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            ends = time.monotonic() + SILENCE_S
            try:
                wanted = next(gen)
                while True:
                    ready = yield wanted
                    if ready:
                        ends = time.monotonic() + SILENCE_S
                    elif time.monotonic() > ends:
                        self.close()  # the answer may come later, when nobody knows to what
                        raise errors.OperationalError(f"the server has been silent for {SILENCE_S:g} s")
                    wanted = gen.send(ready)
            except StopIteration as done:
                return done.value

    def connect(_: Any, __: Any, words: Any, options: dict[str, Any]) -> Connection:
        connection = Connection.connect(*words, **(NETWORK | options))
        connection.execute(f"SET statement_timeout = {STATEMENT_S * 1000}")  # not by `options`: poolers refuse these
        connection.commit()
        return connection

    sa.event.listen(engine, "do_connect", connect)


def unbound(url: str) -> sa.Engine:
    """For migrations, which take as long as they take, and wait for each other."""
    return sa.create_engine(url, hide_parameters=True, poolclass=sa.NullPool, connect_args=NETWORK)


def may_pass(error: sa.exc.OperationalError) -> bool:
    """Whether a server that took no connection may take one later: it starts, moves, has no room."""
    return not any(word in str(error.orig) for word in _WRONG)
