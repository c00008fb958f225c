"""The store on PostgreSQL: JSON, two writers, and a server that was restarted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import httpx
import pytest
from sqlalchemy.orm.exc import StaleDataError

from service.deliverer import Deliverer
from service.principal import LOCAL
from service.settings import Settings
from service.store import Job, JobState, Store
from service.webhooks import Webhooks
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


def test_a_server_that_was_restarted_is_no_error(postgres: Postgres, store: Store) -> None:
    """The sessions of the pool are gone with it; the next one notices before it is used."""
    added(store)
    postgres.stop()
    postgres.start()
    with store.session() as session:
        assert session.query(Job).one().id == "j"
