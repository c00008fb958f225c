"""What a job writes, as server-sent events for those who follow it: lines of its log, points of its curve, its events.

A stream asks for a thread only while it looks, and looks less often while nothing comes. It ends

- with `event: end`, whose data is the state, once nothing more comes: the job has ended, or is paused;
- with `event: refused`, whose data is a problem (`service.problems`), once its token is revoked or has expired;
- without a word after LONGEST_S, so that no client holds its place for days: who follows asks again, as every
  `EventSource` does, and `Last-Event-ID` has it go on where it was.

A source of events is an iterator: each `next` reads what is new, at most MOST_BYTES of it, and never waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

from fastapi import Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from service.declarations import answers
from service.errors import ServiceError, TooMany
from service.jobs import Jobs
from service.logs import Wanted
from service.principal import Principal
from service.store import TERMINAL, JobState
from service.tokens import CACHE_S, Tokens
from workloads.log_file import lines
from workloads.record import RunFolder

logger = logging.getLogger(__name__)

MOST = 100  # streams of a front end, which answers 200 requests at a time: half of them stay for the rest
MOST_OF_TOKEN = 20
LONGEST_S = 300.0
FULL_S = 30.0  # after which one that was refused may try again: places become free as others end
POLL_S = 0.25  # the first pause in which nothing comes; each is twice the one before, up to
MOST_POLL_S = 1.0
KEEP_ALIVE_S = 15.0  # proxies end what is silent for a minute
MOST_BYTES = 1 << 18
ENDED: tuple[JobState, ...] = (*TERMINAL, "PAUSED")  # then nothing is written, perhaps for days

Told = tuple[int | str, str | None]  # the id of an event and its data; None: only that the next connection begins there
Source = Iterator[list[Told]]
Follow = Annotated[bool, Query(description="All of it as server-sent events, as it grows, until the job ends.")]
STREAMED = answers(200)[200] | {
    "content": {
        "text/event-stream": {  # of each event
            "schema": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
                "required": ["data"],
            }
        }
    }
}


class Streams:
    """Opens them, and knows how many are open in this process."""

    def __init__(
        self,
        jobs: Jobs,
        tokens: Tokens,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._jobs, self._tokens, self._clock, self._sleep = jobs, tokens, clock, sleep
        self._open: Counter[str] = Counter()

    def answer(self, job_id: str, source: Source, caller: Principal) -> StreamingResponse:
        """The stream of a source; TooMany is raised where it begins, as only then it takes its place."""
        return _Held(self.events(job_id, source, caller), self._place(caller.token_id or caller.name))

    async def events(self, job_id: str, source: Source, caller: Principal) -> AsyncIterator[str]:
        """What goes over the wire."""
        began = said = self._clock()
        looked, pause = float("-inf"), POLL_S
        state: JobState | None = None
        while (now := self._clock()) - began < LONGEST_S:
            try:
                if now - looked >= CACHE_S:  # before the source: what was written before the end is still read
                    looked, state = now, await run_in_threadpool(self._state, job_id, caller)
                told = await run_in_threadpool(next, source)
            except ServiceError as error:
                yield _event(json.dumps(error.problem()), kind="refused")
                return
            except SQLAlchemyError as error:
                logger.warning("a stream of %s ends, the database does not answer: %s", job_id, error)
                return
            if told:
                yield "".join(_event(data, place) for place, data in told)
                said, pause = now, POLL_S
                continue
            if state in ENDED:
                yield _event(state, kind="end")
                return
            if now - said >= KEEP_ALIVE_S:
                yield ": still here\n\n"
                said = now
            await self._sleep(pause)
            pause = min(2 * pause, MOST_POLL_S)

    def _state(self, job_id: str, caller: Principal) -> JobState:
        self._tokens.expect_good(caller)
        return self._jobs.get(job_id).state

    @contextmanager
    def _place(self, key: str) -> Iterator[None]:
        of_all, own = self._open.total(), self._open[key]
        if of_all >= MOST or own >= MOST_OF_TOKEN:
            what = f"{own} of this token" if own >= MOST_OF_TOKEN else f"{of_all} in all"
            raise TooMany(
                f"got one more stream, with {what} open; expected at most {MOST_OF_TOKEN} and {MOST}",
                "end some, or ask without `follow`",
                FULL_S,
            )
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1
            self._open += Counter()  # drops those at zero


class _Held(StreamingResponse):
    """Holds a place from its first byte to its last, also where the client has gone before the first."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], place: AbstractContextManager[None]) -> None:
        super().__init__(content, headers={"X-Accel-Buffering": "no"})  # NGINX would keep it until it is long
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


def log_lines(log: Path, offset: int, wanted: Wanted) -> Source:
    """Whole lines of a log from a place on; the id is the place behind one."""
    wanted.begin_at(log, offset)
    while True:
        told: list[Told] = []
        takes = True
        for line, end in lines(log, offset, MOST_BYTES):
            offset = end
            if takes := wanted.takes(line):
                told.append((offset, line.decode(errors="replace").rstrip()))
        yield told if takes else [*told, (offset, None)]


def points(run: RunFolder, after_step: int, offset: int) -> Source:
    """Points of the curve with a step above `after_step`, as they are written; the id is the byte behind one.

    No step would do as an id: a resumed run repeats those after its checkpoint, and the later point of a step counts.
    """
    while True:
        found = run.read_points(after=offset, most=MOST_BYTES)
        offset = found[-1][1] if found else offset
        told: list[Told] = [(place, json.dumps(point)) for point, place in found if point["step"] > after_step]
        yield told or [(offset, None)] if found else []


def job_events(jobs: Jobs, job_id: str, cursor: str) -> Source:
    """What happened to a job; the id is the cursor of an event."""
    while True:
        found = jobs.events(job_id, cursor)
        cursor = found[-1]["cursor"] if found else cursor
        yield [(event["cursor"], json.dumps(event)) for event in found]


def _event(data: str | None, place: int | str | None = None, kind: str | None = None) -> str:
    """One event on the wire; where its data has several lines, as of a progress bar, so has it."""
    fields = [f"event: {kind}"] if kind else []
    fields += [] if place is None else [f"id: {place}"]
    fields += [] if data is None else [f"data: {line}" for line in re.split(r"\r\n|\r|\n", data)]
    return "\n".join(fields) + "\n\n"
