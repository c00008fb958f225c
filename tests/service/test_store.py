"""Schema and migrations agree; two writers of a row do not overwrite each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.orm.exc import StaleDataError

from service.store import Base, Job, Store


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


def test_the_second_writer_is_told(store: Store) -> None:
    with store.session() as session:
        session.add(Job(id="j", name="n", spec={}, origin="rest", state="QUEUED"))
    with pytest.raises(StaleDataError), store.session() as second:
        row = second.query(Job).one()
        second.connection().exec_driver_sql("UPDATE jobs SET revision = revision + 1")  # somebody else was faster
        row.step = 1
    store.close()
