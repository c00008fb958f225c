"""The store on PostgreSQL: migrations, JSON, two writers, and a server that was restarted."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import httpx
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.orm.exc import StaleDataError

from service.deliverer import Deliverer
from service.principal import LOCAL
from service.settings import Settings
from service.store import Base, Job, JobState, Store
from service.webhooks import Webhooks

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'manta[postgres]'")
AS_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups") if os.geteuid() == 0 else ()


class Server:
    """A PostgreSQL of our own on loopback, in a folder under the system's temporary one: socket paths are short."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self._folder = folder
        self._run("initdb", "--pgdata", folder / "data", "--auth", "trust", "--username", "manta", "--no-sync")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://manta@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c fsync=off -k {self._folder}"
        self._pg_ctl("start", "--options", options, "--log", self._folder / "log")

    def stop(self) -> None:
        self._pg_ctl("stop", "--mode", "fast")

    def _pg_ctl(self, *words: str | Path) -> None:
        self._run("pg_ctl", "--pgdata", self._folder / "data", "--wait", *words)

    def _run(self, *words: str | Path) -> None:
        subprocess.run([*AS_NOBODY, *words], check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Runs as a user other than root, which PostgreSQL insists on."""
    if not all(shutil.which(name) for name in ("initdb", "pg_ctl", *AS_NOBODY[:1])):
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if AS_NOBODY:
        shutil.chown(folder, "nobody", "nogroup")
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture
def store(server: Server) -> Iterator[Store]:
    store = Store(server.url)
    yield store
    Base.metadata.drop_all(store.engine)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    store.close()


def added(store: Store) -> None:
    with store.session() as session:
        job = Job(id="j", name="n", spec={"a": [1, None]}, origin="rest")
        job.become("QUEUED", "accepted")
        session.add(job)


def test_migrations_make_the_schema_of_the_models(store: Store) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    Store(str(store.engine.url)).close()  # a second time changes nothing


def test_a_row_comes_back_as_it_was(store: Store) -> None:
    added(store)
    with store.session() as session:
        job = session.query(Job).one()
        assert (job.spec, job.state, [event.kind for event in session.scalars(job.events.select())]) == (
            {"a": [1, None]},
            "QUEUED",
            ["queued"],
        )


def test_the_second_writer_is_told(store: Store) -> None:
    added(store)
    with pytest.raises(StaleDataError), store.session() as second:
        row = second.query(Job).one()
        with store.session() as first:
            first.query(Job).one().step = 1
        row.step = 2


def test_two_front_ends_tell_a_webhook_of_each_event_in_order(store: Store, tmp_path: Path) -> None:
    """Both at once, while events are written."""
    settings, got, jobs = Settings(home=tmp_path, webhook_hosts="127.0.0.1"), [], 6
    Webhooks(settings, store).create(LOCAL, "default", "https://127.0.0.1/x", list(get_args(JobState)))

    def receive(request: httpx.Request) -> httpx.Response:
        data = json.loads(request.content)["data"]
        got.append((request.headers["webhook-id"], data["id"], data["message"]))
        return httpx.Response(200)

    def tell() -> None:
        deliverer = Deliverer(settings, store, transport=httpx.MockTransport(receive))
        while len(got) < 5 * jobs and time.monotonic() < ends:
            deliverer.round()

    ends = time.monotonic() + 60
    tellers = [threading.Thread(target=tell) for _ in range(2)]
    for teller in tellers:
        teller.start()
    for i in range(5):
        for name in range(jobs):
            with store.session() as session:
                job = session.query(Job).filter_by(id=f"j{name}").one_or_none()
                job = job or Job(id=f"j{name}", name="n", spec={}, origin="rest")
                job.become("RUNNING", str(i))
                session.add(job)
    for teller in tellers:
        teller.join()
    assert len({message for message, _, _ in got}) == len(got) == 5 * jobs
    assert all([text for _, job, text in got if job == f"j{name}"] == list("01234") for name in range(jobs))


def test_a_server_that_was_restarted_is_no_error(server: Server, store: Store) -> None:
    """The sessions of the pool are gone with it; the next one notices before it is used."""
    added(store)
    server.stop()
    server.start()
    with store.session() as session:
        assert session.query(Job).one().id == "j"
