"""One PostgreSQL for the tests of a process, started when the first of them asks, and an empty database for each.

`database` runs a test twice, on SQLite and on PostgreSQL: for tests of what the two could do differently.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from service.store import Store

AS_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups") if os.geteuid() == 0 else ()
# A power cut costs nothing here; waiting for the disk at each commit would.
OPTIONS = ("listen_addresses=127.0.0.1", "fsync=off", "synchronous_commit=off", "full_page_writes=off")


def missing() -> str | None:
    """Why there is no PostgreSQL here; None where there is one."""
    if find_spec("psycopg") is None:
        return "psycopg is not installed: pip install 'manta[postgres]'"
    if not all(shutil.which(name) for name in ("initdb", "pg_ctl", *AS_NOBODY[:1])):
        return "PostgreSQL is not installed: apt-get install postgresql, and its bin folder in PATH"
    return None


class Postgres:
    """A server on loopback, in a folder under the system's temporary one: socket paths are short.

    It runs as a user other than root, which PostgreSQL insists on.
    """

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._folder = folder
        words = ("--auth", "trust", "--username", "manta", "--encoding", "UTF8", "--locale", "C", "--no-sync")
        self._run("initdb", "--pgdata", folder / "data", *words)

    def url(self, name: str = "postgres") -> str:
        return f"postgresql+psycopg://manta@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        options = " ".join(f"-c {option}" for option in OPTIONS)
        self._pg_ctl("start", "--options", f"-p {self.port} -k {self._folder} {options}", "--log", self._folder / "log")

    def stop(self) -> None:
        self._pg_ctl("stop", "--mode", "fast")

    def query(self, statement: str) -> list[Any]:
        """Outside of any transaction, as CREATE DATABASE needs it."""
        import psycopg

        with psycopg.connect(f"postgresql://manta@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def create(self, template: str = "template0") -> str:
        """The name of a new database: an empty one, or a copy."""
        name = f"t_{uuid.uuid4().hex[:12]}"
        self.query(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        self.query(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _pg_ctl(self, *words: str | Path) -> None:
        self._run("pg_ctl", "--pgdata", self._folder / "data", "--wait", *words)

    def _run(self, *words: str | Path) -> None:
        subprocess.run([*AS_NOBODY, *words], check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")


@contextmanager
def running() -> Iterator[Postgres]:
    """A server for the length of the block; nothing of it stays."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if AS_NOBODY:
        shutil.chown(folder, "nobody", "nogroup")
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if why := missing():
        pytest.skip(why)
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def migrated(postgres: Postgres) -> str:
    """The name of a database with the newest schema, to be copied: faster than migrations."""
    name = postgres.create()
    with closing(Store(postgres.url(name))):
        return name


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without jobs."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'manta.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create(request.getfixturevalue("migrated"))
    yield server.url(name)
    server.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create()
    yield server.url(name)
    server.drop(name)
