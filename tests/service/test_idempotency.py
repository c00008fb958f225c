"""Fifty clients with one Idempotency-Key at the same moment, over the real app, on both databases."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import build
from service.parts import Parts, build_parts
from service.principal import LOCAL
from service.settings import Settings
from tests.service.fakes import FakeRay, local_client
from tests.service.rest import NoDeployments
from tests.service.world import BODY

CLIENTS = 50
KEY = {"Idempotency-Key": "one-of-a-kind"}


@pytest.fixture
def parts(database: str, tmp_path: Path) -> Iterator[Parts]:
    parts = build_parts(
        Settings(home=tmp_path, database_url=database),
        ray=FakeRay(),  # type: ignore[arg-type]
        deployments=NoDeployments(),  # type: ignore[arg-type]
        check=lambda *_: [],
        wake=lambda: None,
    )
    yield parts
    parts.store.close()


def at_once(app: FastAPI, path: str, bodies: list[Any]) -> list[httpx.Response]:
    """Each body by a client of its own; all begin together."""
    together = threading.Barrier(len(bodies))

    def post(body: Any) -> httpx.Response:
        client = local_client(app, **KEY)
        together.wait()
        return client.post(path, json=body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(post, bodies))


@pytest.mark.parametrize("kind", ["job", "batch", "clone"])
def test_the_same_request_at_once_makes_one(parts: Parts, kind: str) -> None:
    app, before = build(parts.settings, parts), parts.submissions.submit(BODY)[0].id
    path, body, made = {
        "job": ("/v1/jobs", BODY, 1),
        "batch": ("/v1/jobs:batch", [BODY, BODY | {"name": "second", "after": ["$toy"]}], 2),
        "clone": (f"/v1/jobs/{before}:clone", {"epochs": 2}, 1),
    }[kind]
    answers = at_once(app, path, [body] * CLIENTS)
    assert Counter(answer.status_code for answer in answers) == {201: 1, 200: CLIENTS - 1}
    documents = [answer.json().get("jobs", [answer.json()]) for answer in answers]
    assert len({tuple(job["id"] for job in document) for document in documents}) == 1
    assert len(parts.jobs.list(limit=500)) == 1 + made
    events = [event["kind"] for job in documents[0] for event in parts.jobs.events(job["id"])]
    assert events == ["queued"] * made
    noted = parts.audit.list(LOCAL, limit=100)
    assert Counter(entry.status for entry in noted) == {201: made, 200: made * (CLIENTS - 1)}  # one of each job


@pytest.mark.parametrize("kind", ["job", "batch", "clone"])
def test_other_bodies_under_the_same_key_are_refused(parts: Parts, kind: str) -> None:
    app, before = build(parts.settings, parts), parts.submissions.submit(BODY)[0].id
    bodies = [BODY | {"epochs": 1 + i} for i in range(CLIENTS)]
    path, several = {
        "job": ("/v1/jobs", bodies),
        "batch": ("/v1/jobs:batch", [[body] * (1 + i % 3) for i, body in enumerate(bodies)]),
        "clone": (f"/v1/jobs/{before}:clone", [{"epochs": 1 + i} for i in range(CLIENTS)]),
    }[kind]
    answers = at_once(app, path, list(several))
    assert Counter(answer.status_code for answer in answers) == {201: 1, 409: CLIENTS - 1}
    (won,) = [answer.json() for answer in answers if answer.status_code == 201]
    made = won.get("jobs", [won])
    assert len(parts.jobs.list(limit=500)) == 1 + len(made)  # of the others nothing stays, not even a part of a list
    assert all(made[0]["id"] in a.json()["detail"] for a in answers if a.status_code == 409)
    again = local_client(app, **KEY).post(path, json=several[[a.status_code for a in answers].index(201)])
    assert again.status_code == 200 and again.json().get("jobs", [again.json()])[0]["id"] == made[0]["id"]


def test_a_key_is_of_its_project(parts: Parts) -> None:
    app = build(parts.settings, parts)
    parts.projects.create(LOCAL, "other")
    ids = {local_client(app, **KEY).post(f"/v1/jobs?project={p}", json=BODY).json()["id"] for p in ("default", "other")}
    assert len(ids) == 2
