"""A database that hangs, is full, or comes later than its front end."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import service.migrate as migrate_module
import service.postgres
from service.local_cluster import ClusterError, up
from service.parts import build_parts
from service.settings import Settings
from service.store import Store
from tests.postgres import Postgres
from tests.service.rest import Service


@pytest.fixture
def store(postgres: Postgres, migrated: str) -> Iterator[Store]:
    name = postgres.create(migrated)
    with closing(Store(postgres.url(name))) as store:
        yield store
    postgres.drop(name)


def ask(store: Store) -> None:
    with store.session() as session:
        session.execute(sa.text("SELECT 1"))


class Clock:
    """Goes on by `step` whenever it is read, and by sleeping; `on_sleep` is told of that."""

    def __init__(self) -> None:
        self.now, self.step, self.slept = 0.0, 0.0, list[float]()
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        self.now += self.step
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        self.on_sleep()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def closed(password: str = "x") -> str:
    """The URL of a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"postgresql+psycopg://manta:{password}@127.0.0.1:{probe.getsockname()[1]}/x"


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"postgresql+psycopg://manta@127.0.0.1:{server.getsockname()[1]}/x"


def backend(session: Session) -> int:
    pid: int = session.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    return pid


def test_a_server_that_hangs_ends_the_statement(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.postgres, "SILENCE_S", 0.2)
    with pytest.raises(OperationalError, match=r"the server has been silent for 0\.2 s"), store.session() as session:
        pid = backend(session)
        with stopped(pid):
            session.execute(sa.text("SELECT 1"))
    with store.session() as session:
        assert backend(session) != pid


def test_a_connection_whose_server_hangs_is_replaced(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.postgres, "SILENCE_S", 0.2)
    with store.session() as session:
        pid = backend(session)
    with stopped(pid), store.session() as session:
        assert backend(session) != pid


def test_a_server_that_answers_slowly_but_steadily_does_not_hang(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is set anew by whatever arrives."""
    clock = Clock()
    monkeypatch.setattr(service.postgres, "time", clock)
    with store.session() as session:
        clock.step = service.postgres.SILENCE_S / 20
        rows = session.execute(sa.text("SELECT repeat('x', 100000) FROM generate_series(1, 200)"))
        assert len(rows.all()) == 200


def test_the_server_ends_a_statement_that_takes_too_long(store: Store) -> None:
    with store.session() as session:
        assert session.scalar(sa.text("SHOW statement_timeout")) == f"{service.postgres.STATEMENT_S}s"
        session.execute(sa.text("SET LOCAL statement_timeout = 10"))
        with pytest.raises(OperationalError, match="statement timeout"):
            session.execute(sa.text("SELECT pg_sleep(10)"))


def test_what_the_url_says_of_the_network_goes_before(postgres: Postgres) -> None:
    engine = sa.create_engine(postgres.url() + "?connect_timeout=77&keepalives_idle=7")
    service.postgres.bound(engine)
    with engine.connect() as connection:
        words = connection.connection.dbapi_connection.info.get_parameters()  # type: ignore[union-attr]
    engine.dispose()
    assert (words["connect_timeout"], words["keepalives_idle"], words["tcp_user_timeout"]) == ("77", "7", "10000")


def test_a_server_that_takes_connections_and_says_nothing(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(service.postgres.NETWORK, "connect_timeout", 1)
    with pytest.raises(OperationalError, match="timeout"):
        Store(silent)


# Requests: each of these is retryable.


def test_a_pool_without_a_free_connection_is_a_matter_of_time(service: Service, client: TestClient) -> None:
    assert client.get("/v1/jobs").status_code == 200
    engine = service.parts.store.engine
    assert isinstance(engine.pool, sa.QueuePool)
    engine.pool._timeout = 0
    with ExitStack() as taken:
        while engine.pool.checkedout() < 15:
            taken.enter_context(engine.connect())
        answer = client.get("/v1/jobs")
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["retryable"]) == (503, "Unavailable", True)
    assert problem["detail"] == "the database does not answer" and answer.headers["Retry-After"]
    assert client.get("/v1/jobs").status_code == 200


# Starts


def test_a_front_end_waits_for_a_database_that_comes_later(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, name = Clock(), postgres.create()
    monkeypatch.setattr(migrate_module, "time", clock)

    def come() -> None:
        if len(clock.slept) == 3:
            postgres.start()

    clock.on_sleep = come
    postgres.stop()
    with closing(Store(postgres.url(name), patience_s=60)) as store:
        ask(store)
    assert clock.slept == [0.5, 1, 2]
    waits = [record.message for record in caplog.records if record.message.startswith("waits for the database")]
    assert len(waits) == 3 and f":{postgres.port}/{name} (" in waits[0] and "refused" in waits[0]
    postgres.drop(name)


def test_it_waits_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(migrate_module, "time", clock)
    with pytest.raises(OperationalError, match="refused"):
        Store(closed(), patience_s=20)
    assert clock.slept == [0.5, 1, 2, 4, 8]


def test_what_stays_wrong_is_not_waited_for(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(migrate_module, "time", clock)
    with pytest.raises(OperationalError, match="does not exist"):
        Store(postgres.url("no_such_database"), patience_s=60)
    assert clock.slept == []


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("connection failed: FATAL:  the database system is starting up", True),
        ("connection failed: FATAL:  sorry, too many clients already", True),
        ("failed to resolve host 'db': [Errno -3] Temporary failure in name resolution", True),
        ("failed to resolve host 'db': [Errno -2] Name or service not known", False),
        ('connection failed: FATAL:  password authentication failed for user "manta"', False),
        ("connection failed: FATAL:  no pg_hba.conf entry for host", False),
    ],
)
def test_which_errors_may_pass(said: str, passes: bool) -> None:
    assert service.postgres.may_pass(OperationalError(None, None, Exception(said))) == passes


def test_a_person_who_starts_it_with_a_wrong_address_reads_that_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_DATABASE_URL", closed("secret"))
    with pytest.raises(ClusterError, match=r"got a database that cannot be opened: .*refused") as told:
        up(tmp_path)
    assert "check MANTA_DATABASE_URL" in str(told.value) and "secret" not in str(told.value)


def test_a_front_end_is_patient_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def opened(url: str, patience_s: float = 0.0) -> Store:
        asked.append((url, patience_s))
        raise InterruptedError

    monkeypatch.setattr("service.parts.Store", opened)
    with pytest.raises(InterruptedError):
        build_parts(Settings(home=tmp_path, database_url="postgresql+psycopg://db/x"))
    assert asked == [("postgresql+psycopg://db/x", 120.0)]
