"""Streams of a job: what comes, how they end, how many there may be; nobody waits for a clock."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy.exc import OperationalError

from service import app, streams
from service.errors import TooMany
from service.logs import Wanted
from service.principal import LOCAL, Principal
from service.store import Job
from service.streams import Streams, job_events, log_lines, points
from tests.service.secured import Secured
from workloads.record import RunFolder


class Stage:
    """A job, and streams whose clock goes on by their pauses; `after` says what happens in the first ones."""

    def __init__(self, service: Secured) -> None:
        self.service, self.now, self.pauses = service, 0.0, list[float]()
        self.job_id = service.job()
        self.run = RunFolder(service.settings.runs / self.job_id)
        self.run.path.mkdir(parents=True)
        self.streams = Streams(service.parts.jobs, service.parts.tokens, lambda: self.now, self._sleep)
        self.after: list[Any] = []

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self.service.now += seconds
        if self.after:
            self.after.pop(0)()

    def become(self, state: Any) -> None:
        with self.service.store.session() as session:
            job = session.query(Job).filter_by(id=self.job_id).one()
            job.become(state, "as the test wants it")

    def follow(self, source: streams.Source | None = None, caller: Principal = LOCAL) -> str:
        async def whole() -> str:
            source_ = log_lines(self.run.log, 0, Wanted()) if source is None else source
            return "".join([text async for text in self.streams.events(self.job_id, source_, caller)])

        return asyncio.run(whole())


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    yield service
    service.close()


@pytest.fixture
def stage(service: Secured) -> Stage:
    return Stage(service)


def test_lines_come_as_they_are_written_until_the_end(stage: Stage) -> None:
    def write(text: str) -> None:
        with open(stage.run.log, "a") as file:
            file.write(text)

    def end() -> None:
        write("last\n")
        stage.become("SUCCEEDED")

    stage.after = [lambda: write("fir"), lambda: write("st\n"), lambda: None, end]
    assert stage.follow() == "id: 6\ndata: first\n\nid: 11\ndata: last\n\nevent: end\ndata: SUCCEEDED\n\n"


def test_a_paused_job_ends_its_streams(stage: Stage) -> None:
    stage.become("PAUSED")
    assert stage.follow() == "event: end\ndata: PAUSED\n\n" and stage.pauses == []


def test_a_silent_stream_looks_seldom_says_that_it_is_there_and_makes_room(stage: Stage) -> None:
    assert set(stage.follow().split("\n\n")) == {": still here", ""}  # and no word at its end: who follows comes again
    assert stage.pauses[:4] == [0.25, 0.5, 1.0, 1.0] and streams.LONGEST_S <= stage.now <= streams.LONGEST_S + 1


def test_places_are_told_also_where_no_line_is_wanted(stage: Stage) -> None:
    """So that a stream that goes on does not read the whole log again."""
    stage.run.log.write_text("2026-11-22 06:00:00,123 INFO x: a\n" * 3)
    stage.become("FAILED")
    source = log_lines(stage.run.log, 0, Wanted(level="ERROR"))
    assert stage.follow(source) == f"id: {stage.run.log.stat().st_size}\n\nevent: end\ndata: FAILED\n\n"


def test_a_progress_bar_keeps_its_event_whole(stage: Stage) -> None:
    stage.run.log.write_bytes(b"10%\r20%\r\n")
    stage.become("SUCCEEDED")
    assert stage.follow().startswith("id: 9\ndata: 10%\ndata: 20%\n\n")


def test_points_come_again_where_a_run_repeats_its_steps(stage: Stage) -> None:
    lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in ((10, 1.0), (20, 1.0), (20, 0.5))]
    stage.run.metrics.write_text("".join(lines[:2]) + '{"step"')
    first = points(stage.run, -1, 0)
    told = next(first)
    assert [json.loads(data or "")["step"] for _, data in told] == [10, 20] and next(first) == []
    stage.run.metrics.write_text("".join(lines))
    again = [(sum(map(len, lines)), lines[2].rstrip())]
    assert next(first) == again == next(points(stage.run, -1, int(told[-1][0])))
    assert next(points(stage.run, 10, 0)) == [(len(lines[0]) * 2, lines[1].rstrip()), *again]
    assert next(points(stage.run, 20, 0)) == [(again[0][0], None)]


def test_a_long_curve_comes_in_parts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_BYTES", 64)
    stage.run.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(50)))
    stage.become("SUCCEEDED")
    text = stage.follow(points(stage.run, -1, 0))
    assert [json.loads(line[6:])["step"] for line in text.splitlines() if line.startswith("data: {")] == [*range(50)]


def test_events_go_on_behind_their_cursor(stage: Stage) -> None:
    jobs = stage.service.parts.jobs
    stage.become("RUNNING")
    stage.run.event("hang", "rank 1")
    whole = next(job_events(jobs, stage.job_id, "0-0"))
    assert sorted(json.loads(data or "")["kind"] for _, data in whole) == ["hang", "queued", "running"]
    assert next(job_events(jobs, stage.job_id, str(whole[0][0]))) == whole[1:]
    source = job_events(jobs, stage.job_id, str(whole[-1][0]))
    stage.after = [lambda: stage.become("FAILED")]
    kinds = [json.loads(line[6:])["kind"] for line in stage.follow(source).splitlines() if line.startswith("data: {")]
    assert kinds == ["failed"]


def test_the_routes_stream_all_three(stage: Stage) -> None:
    stage.run.metrics.write_text('{"step": 1}\n{"step": 2}\n')
    stage.run.log.write_text("first\n")
    stage.become("SUCCEEDED")
    client, url = stage.service.client(), f"/v1/jobs/{stage.job_id}"
    for what, last, data in (("logs", "0", "first"), ("metrics", "12", '{"step": 2}'), ("events", "1-0", "succeeded")):
        answer = client.get(f"{url}/{what}?follow=true", headers={"Last-Event-ID": last})
        assert answer.headers["content-type"].startswith("text/event-stream")
        told, end, rest = answer.text.split("\n\n")
        assert data in told and told.count("data: ") == 1 and end == "event: end\ndata: SUCCEEDED" and rest == ""
        assert client.get(f"{url}/{what}?follow=true", headers={"Last-Event-ID": "x"}).status_code == 422
        assert client.get(f"/v1/jobs/none/{what}?follow=true").status_code == 404


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_stream_outlives_its_token_by_a_second_at_most(stage: Stage, how: str) -> None:
    tokens = stage.service.parts.tokens
    row, text = tokens.create(LOCAL, "ann", "admin", "*", 10.0)
    if how == "revoked":
        stage.after = [lambda: None, lambda: tokens.revoke(LOCAL, row.id) and None]
    told = stage.follow(caller=tokens.authenticate(text))
    kind, data = told.splitlines()[:2]
    assert kind == "event: refused" and json.loads(data[6:])["code"] == "InvalidToken" and how in data
    assert stage.now <= (0.25 + 0.5 if how == "revoked" else 10.0) + 1.0


def test_the_first_token_ends_streams_that_began_without(stage: Stage) -> None:
    stage.after = [lambda: stage.service.token("root", "admin") and None]
    assert "event: refused" in stage.follow() and stage.now <= 2.0


def test_a_database_that_is_away_ends_a_stream_without_a_word(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: str) -> Job:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(stage.service.parts.jobs, "get", away)
    assert stage.follow() == ""


def test_places_are_limited_for_each_token_and_in_all(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST", 3)
    monkeypatch.setattr(streams, "MOST_OF_TOKEN", 2)
    take = service.parts.streams._place
    with take("a"), take("a"):
        with pytest.raises(TooMany, match="2 of this token") as caught, take("a"):
            pass
        assert caught.value.headers == {"Retry-After": "30"}
        with take("b"), pytest.raises(TooMany, match="3 in all"), take("c"):
            pass
        with take("c"):  # its place is free again
            pass
    assert not service.parts.streams._open
    assert 2 * streams.MOST <= app.MOST_REQUESTS


def test_one_too_many_is_refused_before_it_begins(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_OF_TOKEN", 0)
    answer = stage.service.client().get(f"/v1/jobs/{stage.job_id}/logs?follow=true")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "30") and answer.json()["code"] == "TooMany"


def test_streams_that_wait_hold_no_threads(stage: Stage) -> None:
    """Far more than there are threads for requests wait at the same time."""
    began, threads = 0, threading.active_count()

    async def many() -> int:
        async def wait(_: float) -> None:
            nonlocal began
            began += 1
            await asyncio.Event().wait()

        waiting = Streams(stage.service.parts.jobs, stage.service.parts.tokens, lambda: 0.0, wait)

        async def drain() -> None:
            async for _ in waiting.events(stage.job_id, log_lines(stage.run.log, 0, Wanted()), LOCAL):
                pass

        tasks = [asyncio.create_task(drain()) for _ in range(100)]
        while began < len(tasks):
            await asyncio.sleep(0.001)
        most = threading.active_count()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most

    assert asyncio.run(many()) - threads <= 41 and began == 100  # 40: what the pool has


def test_over_a_real_socket_who_leaves_gives_the_place_back(stage: Stage) -> None:
    """Streams that wait leave room for other requests; Ray Serve runs the app under this server too."""

    async def scene() -> tuple[list[int], int, int]:
        server = uvicorn.Server(uvicorn.Config(stage.service.app, port=0, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        port, path = server.servers[0].sockets[0].getsockname()[1], f"/v1/jobs/{stage.job_id}"
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            async with AsyncExitStack() as open_ones:
                streams_ = [client.stream("GET", f"{path}/events?follow=true") for _ in range(21)]
                codes = [(await open_ones.enter_async_context(stream)).status_code for stream in streams_]
                meanwhile = (await client.get(path)).status_code
            while stage.service.parts.streams._open:
                await asyncio.sleep(0.001)
            server.should_exit = True
            await serving
        return codes, meanwhile, stage.service.parts.streams._open.total()

    codes, meanwhile, left = asyncio.run(asyncio.wait_for(scene(), 20))
    assert codes == [200] * 20 + [429] and (meanwhile, left) == (200, 0)
