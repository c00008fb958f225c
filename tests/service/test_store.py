"""Schema and migrations agree; two writers of a row do not overwrite each other."""

from __future__ import annotations

from pathlib import Path

import alembic.command
import alembic.config
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.orm.exc import StaleDataError

import service.store
from service.store import Base, Job, Store, migrate


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'sub' / 'manta.db'}")


def test_migrations_make_the_schema_of_the_models(store: Store) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_opening_again_changes_nothing(store: Store) -> None:
    with store.session() as session:
        session.add(Job(id="j", name="n", spec={}, origin="rest", state="QUEUED"))
    again = Store(str(store.engine.url))
    with again.session() as session:
        assert session.query(Job).one().id == "j"
    again.close()
    store.close()


def test_a_database_of_the_first_version_keeps_its_jobs(store: Store) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(service.store.__file__).parent / "migrations"))
    with store.session() as session:
        session.add(Job(id="j", name="n", spec={}, origin="rest", state="RUNNING"))
    with store.engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, "0001")
    migrate(store.engine)
    with store.session() as session:
        row = session.query(Job).one()
        assert (row.id, row.state, row.resumed_at) == ("j", "RUNNING", None)
        row.become("PAUSING", "pause")
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
