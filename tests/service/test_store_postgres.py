"""The store on PostgreSQL: JSON, two writers, and a server that was restarted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.orm.exc import StaleDataError

from service.store import Job, Store
from tests.postgres import Postgres


@pytest.fixture
def store(postgres: Postgres, migrated: str) -> Iterator[Store]:
    name = postgres.create(migrated)
    store = Store(postgres.url(name))
    yield store
    store.close()
    postgres.drop(name)


def added(store: Store) -> None:
    with store.session() as session:
        job = Job(id="j", name="n", spec={"a": [1, None]}, origin="rest")
        job.become("QUEUED", "accepted")
        session.add(job)


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


def test_a_server_that_was_restarted_is_no_error(postgres: Postgres, store: Store) -> None:
    """The sessions of the pool are gone with it; the next one notices before it is used."""
    added(store)
    postgres.stop()
    postgres.start()
    with store.session() as session:
        assert session.query(Job).one().id == "j"
