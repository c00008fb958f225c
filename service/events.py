"""What happened to a job: what the service did, and what its run told, as one list in the order of time.

A cursor is `<id of the last row>-<byte in events.jsonl>`. Each source keeps its own order,
whatever the clocks of the machines say, so whoever asks again from the last cursor gets
each event exactly once.
"""

from __future__ import annotations

import heapq
from datetime import UTC, datetime

import sqlalchemy as sa

from service.job_views import EventView
from service.store import Job, JobEvent, Store
from workloads.record import RunFolder

START = "0-0"
CURSOR = r"^[0-9]{1,9}-[0-9]{1,12}$"


def read_events(store: Store, job: Job, run: RunFolder, after: str = START) -> list[EventView]:
    """Events behind the cursor `after`: `time`, `kind`, `message`, and the `cursor` behind each of them."""
    row, offset = map(int, after.split("-"))
    query = sa.select(JobEvent).where(JobEvent.job_number == job.number, JobEvent.id > row).order_by(JobEvent.id)
    with store.session() as session:
        ours = [{"id": e.id, "time": e.time, "kind": e.kind, "message": e.message} for e in session.scalars(query)]
    events: list[EventView] = []
    for event in heapq.merge(ours, run.read_events(after=offset), key=lambda event: event["time"]):
        row, offset = event.get("id", row), event.get("offset", offset)
        events.append(
            {
                "time": datetime.fromtimestamp(event["time"], UTC).isoformat(),
                "kind": event["kind"],
                "message": event["message"],
                "cursor": f"{row}-{offset}",
            }
        )
    return events
