"""What the store keeps; two writers of a row do not overwrite each other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from service import sqlite
from service.migrate import migrate
from service.store import Job, ModelName, Project, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'sub' / 'manta.db'}")


def test_opening_again_changes_nothing(store: Store) -> None:
    with store.session() as session:
        session.add(Job(id="j", name="n", spec={}, origin="rest", state="QUEUED"))
    again = Store(str(store.engine.url))
    with again.session() as session:
        assert session.query(Job).one().id == "j"
    again.close()
    store.close()


OLD = {
    "jobs": "INSERT INTO jobs (id, name, spec, origin, state, attempt, stalled, best_step, created_at, step, epoch,"
    " total_steps, cpus, gpus, idempotency_key, body_hash, revision)"
    " VALUES ('j{i}', 'n', '{{}}', 'rest', 'QUEUED', 0, 0, 0, 1.5, 0, 0, 0, 1, 0, {key}, 'h', 0)",
    "job_events": "INSERT INTO job_events (job_number, time, kind, message) VALUES ({i}, 1.5, 'queued', 'accepted')",
    "model_versions": "INSERT INTO model_versions (name, version, kind, job_id, source, card, created_at)"
    " VALUES ('m', {i}, 'encoder', 'j{i}', 'artifact', '{{}}', 1.5)",
}


@pytest.fixture
def old(tmp_path: Path) -> Iterator[sa.Engine]:
    """A database of the version before projects, with two jobs, their events and a model of two versions."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    sa.event.listen(engine, "connect", sqlite.pragmas)
    migrate(engine, "0002")
    with engine.begin() as connection:
        for i, key in ((1, "'k'"), (2, "NULL")):
            for statement in OLD.values():
                connection.exec_driver_sql(statement.format(i=i, key=key))
    yield engine
    engine.dispose()


def test_a_database_from_before_projects_keeps_everything(old: sa.Engine) -> None:
    migrate(old)
    store = Store(str(old.url))
    with store.session() as session:
        jobs = session.query(Job).order_by(Job.number).all()
        assert [(j.id, j.project, j.owner, j.idempotency_key) for j in jobs] == [
            ("j1", "default", "local", "k"),
            ("j2", "default", "local", None),
        ]
        events = [event.message for event in session.scalars(jobs[1].events.select())]
        assert events == ["accepted"]
        assert [(row.name, row.project) for row in session.query(ModelName)] == [("m", "default")]
        assert [row.name for row in session.query(Project)] == ["default"]
        session.add(Job(id="j3", name="n", spec={}, origin="rest", state="QUEUED", project="one", idempotency_key="k"))
    with pytest.raises(IntegrityError), store.session() as session:
        session.add(Job(id="j4", name="n", spec={}, origin="rest", state="QUEUED", idempotency_key="k"))
    with (
        pytest.raises(IntegrityError),
        store.session() as session,
    ):  # foreign keys hold again, and point to the new table
        session.execute(sa.text("INSERT INTO job_events (job_number, time, kind, message) VALUES (99, 1, 'x', 'y')"))
        session.commit()
    store.close()


def test_a_migration_that_breaks_off_leaves_the_database_as_it_was(
    old: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def columns() -> dict[str, list[str]]:
        inspector = sa.inspect(old)
        return {table: [c["name"] for c in inspector.get_columns(table)] for table in inspector.get_table_names()}

    def power_cut(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    before = columns()
    monkeypatch.setattr("alembic.op.batch_alter_table", power_cut)  # the last step of 0003
    with pytest.raises(RuntimeError, match="power cut"):
        migrate(old)
    assert columns() == before
    monkeypatch.undo()
    migrate(old)
    assert "project" in columns()["jobs"]


def test_back_to_the_version_before_and_forth(store: Store) -> None:
    with store.session() as session:
        session.add(Job(id="j", name="n", spec={}, origin="rest", state="QUEUED", project="one", idempotency_key="k"))
    migrate(store.engine, "0002")
    migrate(store.engine)
    with store.session() as session:
        assert session.query(Job).one().project == "default"  # what the old version could not hold
    store.close()


def test_a_state_and_its_event_are_written_together_or_not_at_all(store: Store) -> None:
    with store.session() as session:
        job = Job(id="j", name="n", spec={}, origin="rest")
        job.become("QUEUED", "accepted")
        session.add(job)
    with pytest.raises(RuntimeError), store.session() as session:
        session.query(Job).one().become("PAUSED", "paused")
        session.flush()
        raise RuntimeError("the service dies before the commit")
    with store.session() as session:
        row = session.query(Job).one()
        events = [event.kind for event in session.scalars(row.events.select())]
        assert (row.state, events) == ("QUEUED", ["queued"])
    store.close()


def test_the_second_writer_is_told(store: Store) -> None:
    with store.session() as session:
        session.add(Job(id="j", name="n", spec={}, origin="rest", state="QUEUED"))
    with pytest.raises(StaleDataError), store.session() as second:
        row = second.query(Job).one()
        second.connection().exec_driver_sql("UPDATE jobs SET revision = revision + 1")  # somebody else was faster
        row.step = 1
    store.close()


def test_writers_of_sqlite_wait_for_their_turn(store: Store) -> None:
    """None of 16 threads finds the database locked, although SQLite itself does not wait at all."""

    def impatient(session: Session) -> None:
        session.execute(sa.text("PRAGMA busy_timeout=0"))

    def write(i: int) -> None:
        for n in range(10):
            with store.session() as session:
                impatient(session)
                session.add(Job(id=f"{i}-{n}", name="n", spec={}, origin="rest", state="QUEUED"))
        with pytest.raises(IntegrityError), store.session() as session:  # whose turn ends as well
            session.add(Job(id=f"{i}-0", name="n", spec={}, origin="rest", state="QUEUED"))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(16)))
    with store.session() as session:
        assert session.query(Job).count() == 160
    store.close()
