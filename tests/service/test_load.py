"""The front end under load, by counts rather than the clock: statements of a page, a burst, what runs at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from service.app import build
from service.parts import Parts, build_parts
from service.settings import Settings
from service.store import Job, ModelVersion
from tests.benchmarks import apart, service_load
from tests.benchmarks.service_load import CPUS, Engine
from tests.service.fakes import local_client, write_record
from tests.service.rest import NoDeployments, Service
from tests.service.world import BODY
from tests.waiting import until
from workloads.record import RunFolder


@contextmanager
def statements(engine: sa.Engine) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        seen.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(engine, "before_cursor_execute", note)


def fill(service: Service, count: int) -> None:
    with service.parts.store.session() as session:
        for i in range(count):
            state = "SUCCEEDED" if i % 2 else "QUEUED"
            more: dict[str, Any] = {"attempt": i % 2, "spec": BODY, "project": "default"}
            session.add(Job(id=f"job-{i}", name="n", origin="rest", state=state, **more))
            for version in range(i % 4):
                session.add(
                    ModelVersion(
                        name=f"m{i}", version=version, kind="e", job_id=f"job-{i}", source=f"{version}", card={}
                    )
                )
            if i % 2:
                write_record(service.runs / f"job-{i}", "SUCCEEDED", skipped=["x"])
                (service.runs / f"job-{i}" / "evaluations.json").write_text('[{"name": "knn"}]')


def test_a_page_costs_the_same_statements_however_long_it_is(service: Service) -> None:
    fill(service, 60)
    client, counted = local_client(service.app), {}
    client.get("/v1/jobs?limit=1")  # tokens are looked for once
    for limit in (1, 50):
        with statements(service.parts.store.engine) as seen:
            page = client.get(f"/v1/jobs?limit={limit}&project=default").json()["jobs"]
        assert len(page) == limit
        counted[limit] = len([one for one in seen if "tokens" not in one])
    assert counted[1] == counted[50] <= 4
    service.parts.store.close()


def test_a_page_says_what_each_job_says_and_opens_no_folder_of_one_that_never_ran(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(service, 12)
    opened, read = Counter[str](), RunFolder.read_record
    monkeypatch.setattr(RunFolder, "read_record", lambda run: (opened.update([run.path.name]), read(run))[1])
    client = local_client(service.app)
    page = client.get("/v1/jobs").json()["jobs"]
    assert opened == {f"job-{i}": 1 for i in range(1, 12, 2)}
    assert page == [client.get(f"/v1/jobs/{job['id']}").json() for job in page]
    by_id = {job["id"]: job for job in page}
    assert by_id["job-7"]["models"] == ["m7@0", "m7@1", "m7@2"] and by_id["job-7"]["skipped"] == ["x"]
    assert by_id["job-7"]["evaluations"] == [{"name": "knn"}] and by_id["job-6"]["evaluations"] == []
    service.parts.store.close()


@pytest.fixture
def parts(database: str, tmp_path: Path) -> Iterator[Parts]:
    settings = Settings(home=tmp_path, database_url=database, reconcile_interval_s=0.05)
    engine: Any = Engine(settings, run_s=0.0)
    parts = build_parts(settings, ray=engine, deployments=NoDeployments(), check=lambda *_: [])  # type: ignore[arg-type]
    yield parts
    parts.stop()


def test_a_burst_loses_nothing_doubles_nothing_and_runs_no_more_than_fits(parts: Parts) -> None:
    """60 submissions of 32 clients while jobs are started and end; each tenth comes twice, as from one that retries.

    Ray's head holds a driver for each job that runs, so what is admitted bounds its memory.
    """
    parts.reconciler.start()
    app, few = build(parts.settings, parts), asyncio.Semaphore(32)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 50000))

    async def post(client: httpx.AsyncClient, i: int) -> tuple[int, str]:
        async with few:
            body, key = BODY | {"name": f"n{i}"}, {"Idempotency-Key": f"k{i}"}
            answer = await client.post("/v1/jobs", json=body, headers=key)
            return answer.status_code, answer.json()["id"]

    async def burst() -> list[tuple[int, str]]:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            order = sorted([*range(60), *range(0, 60, 10)])
            return await asyncio.gather(*(post(client, i) for i in order))

    answers = asyncio.run(burst())
    assert Counter(code for code, _ in answers) == {201: 60, 200: 6}
    ids = {job_id for _, job_id in answers}
    ray: Any = parts.ray
    until(lambda: len(ray.submitted) >= 60)
    until(lambda: not parts.jobs.list(limit=1, state="RUNNING") and not parts.jobs.list(limit=1, state="STARTING"))
    jobs = parts.jobs.list(limit=500)
    assert {job.state for job in jobs} == {"SUCCEEDED"}
    assert {job.id for job in jobs} == ids and len(jobs) == 60
    assert len({job.name for job in jobs}) == 60 and {job.attempt for job in jobs} == {1}
    assert sorted(ray.submitted) == sorted(ids)
    assert 1 < ray.most <= CPUS


def test_the_harness(tmp_path: Path, toy_shards: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At toy size, so that it cannot rot; the front end is the real one, by uvicorn in a process of its own."""
    monkeypatch.setattr(apart, "run", lambda function, **arguments: function(**arguments))
    monkeypatch.setattr(service_load, "LOOKS", 3)
    monkeypatch.setattr(service_load, "SUBMISSIONS", 10)
    monkeypatch.setattr(service_load, "CLIENTS", 4)
    found = service_load.measure(tmp_path / "home", toy_shards["train"], "", jobs=200)
    assert all(ms > 0 for ms in found["looks"].values()) and 0 < found["most"] <= CPUS
    assert found["rate"] > 0 and found["round_s"] > 0 and len(found["ids"]) == 10
