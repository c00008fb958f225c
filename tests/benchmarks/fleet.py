"""`python -m tests.benchmarks.fleet`: a round of the reconciler at 10, 100 and 1,000 nodes with 10,000 queued jobs.

The decisions, the database and the run folders are the real ones; Ray and the clock are made up: a job holds one node
for an hour or so, writes a record at each heartbeat, and every hundredth attempt dies without a word. What a round
costs is measured; what the queue makes of the nodes is checked: nobody overtakes, no node is given twice, none idles.
What the same fleet asks of an object store follows, from `tests.benchmarks.object_store`.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import sqlalchemy as sa

from service.packing import Hardware, Node
from service.ray_jobs import RayStatus, submission_id
from service.reconciler import Reconciler
from service.registry import Registry
from service.settings import Settings
from service.store import ACTIVE, Job, Store
from tests.benchmarks.object_store import GPUS, report
from tests.s3 import served as object_store_server
from tests.toy import TOY_MAE, TOY_MODEL
from workloads.record import HEARTBEAT_S, Record, RunFolder
from workloads.spec import JobSpec

SPEC = JobSpec.model_validate(
    {
        "name": "fleet",
        "method": TOY_MAE,
        "model": TOY_MODEL,
        "data": {"train": {"shards": "/x.tar"}},
        "epochs": 1,
        "batch_size": 64,
        "resources": {"workers": GPUS, "gpus_per_worker": 1},
    }
)


@dataclass
class Run:
    """An attempt: when it ends, and whether its record says how."""

    folder: RunFolder
    attempt: int
    ends_at: float
    dies: bool
    started_at: float


@dataclass
class Fleet:
    """Stands in for RayJobs, and for the nodes: runs start at once, since the service admits only what fits."""

    nodes: int
    settings: Settings
    now: float
    rng: random.Random
    dying: float = 0.01  # share of attempts that vanish
    statuses_: dict[str, RayStatus] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)

    def statuses(self) -> dict[str, RayStatus]:
        return dict(self.statuses_)

    def log_tail(self, job_id: str, attempt: int) -> str:
        return ""  # processes that say nothing

    def hardware(self) -> Hardware:
        return Hardware([Node({"CPU": 12.0 * GPUS, "GPU": float(GPUS)})] * self.nodes)

    def submit(self, job_id: str, attempt: int) -> None:
        assert len(self.runs) < self.nodes, "a node was given twice"
        folder = RunFolder(self.settings.runs / job_id)
        ends_at = self.now + self.rng.uniform(1800, 5400)
        self.statuses_[submission_id(job_id, attempt)] = "RUNNING"
        self.runs[job_id] = Run(folder, attempt, ends_at, self.rng.random() < self.dying, self.now)
        if attempt == 1:
            self.started.append(job_id)
        self._write(self.runs[job_id], "RUNNING")

    def stop(self, job_id: str, attempt: int) -> None:
        raise AssertionError("nobody asks for it")

    def advance(self, seconds: float) -> None:
        """Time passes: records are written, some runs end, and some vanish."""
        self.now += seconds
        for job_id, run in list(self.runs.items()):
            if run.ends_at <= self.now:
                self.statuses_[submission_id(job_id, run.attempt)] = "FAILED" if run.dies else "SUCCEEDED"
                del self.runs[job_id]
            if run.ends_at > self.now or not run.dies:
                self._write(run, "RUNNING" if run.ends_at > self.now else "SUCCEEDED")

    def _write(self, run: Run, state: str) -> None:
        """Without the fsync of the product, which other machines wait for."""
        record = Record(
            job_id=run.folder.path.name,
            state=state,  # type: ignore[arg-type]
            attempt=run.attempt,
            started_at=run.started_at,
            updated_at=self.now,
            step=int(self.now - run.started_at),
            host="elsewhere",
        )
        run.folder.record.write_text(record.model_dump_json())


class NoArtifacts(Registry):
    """What is copied at the end of a job is storage's business."""

    def register(self, *_: object) -> None:  # type: ignore[override]
        return


@dataclass
class Found:
    """Of one size."""

    nodes: int
    full_s: float  # a round while every node is taken and the queue waits
    full_cpu_s: float  # of it, of this process
    first_s: float  # the round that fills the nodes
    statements: int  # of SQL, in a full round
    records: int  # that a full round reads, from the home volume
    busy: float  # share of nodes at work over the simulated time
    ended: int


def simulate(
    nodes: int,
    queued: int,
    folder: Path,
    *,
    url: str = "",
    rounds: int,
    every_s: float = HEARTBEAT_S,
    dying: float = 0.01,
) -> Found:
    """Fills the queue, then looks at it every so many seconds of simulated time.

    Raises:
        AssertionError: a job overtook another, or a node was given twice.
    """
    settings = Settings(home=folder, database_url=url)
    store = Store(settings.database)
    fleet = Fleet(nodes, settings, time.time(), random.Random(nodes), dying)
    registry = NoArtifacts(settings, store)
    reconciler = Reconciler(settings, store, fleet, registry, lambda: None, lambda: fleet.now, releases=None)  # type: ignore[arg-type]
    document = SPEC.model_dump(mode="json")
    resources = {"cpus": SPEC.resources.cpus, "gpus": SPEC.resources.gpus}
    with store.session() as session:
        session.add_all(
            Job(id=f"job-{i:06d}", name="fleet", spec=document, origin="rest", state="QUEUED", **resources)
            for i in range(queued)
        )
    statements = records = 0
    read_record = RunFolder.read_record

    def _read(run: RunFolder) -> Record | None:
        nonlocal records
        records += 1
        return read_record(run)

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def _count(*_: object) -> None:
        nonlocal statements
        statements += 1

    took, cpu, busy, counted, looked = [], [], [], [], []
    for _ in range(rounds):
        before, read, began, used = statements, records, time.perf_counter(), time.process_time()
        with patch.object(RunFolder, "read_record", _read):
            reconciler.round()
        took.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
        counted.append(statements - before)
        looked.append(records - read)
        busy.append(len(fleet.runs) / nodes)
        assert fleet.started == sorted(fleet.started), "somebody overtook"
        fleet.advance(every_s)
    with store.session() as session:
        active = session.scalar(sa.select(sa.func.count()).select_from(Job).where(Job.state.in_(ACTIVE))) or 0
        ended = session.scalar(sa.select(sa.func.count()).select_from(Job).where(Job.state == "SUCCEEDED")) or 0
    assert active <= nodes
    store.close()
    return Found(
        nodes=nodes,
        full_s=statistics.median(took[1:]),
        full_cpu_s=statistics.median(cpu[1:]),
        first_s=took[0],
        statements=int(statistics.median(counted[1:])),
        records=int(statistics.median(looked[1:])),
        busy=statistics.mean(busy),
        ended=ended,
    )


SIZES = (10, 100, 1_000)


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else ""
    print(
        "| nodes | queued | a round, all nodes taken | of it CPU | SQL | records | the round that fills them | busy |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for nodes, queued in ((10, 1_000), *((size, 10_000) for size in SIZES)):
        with tempfile.TemporaryDirectory() as folder:
            found = simulate(nodes, queued + nodes, Path(folder), url=url, rounds=6)
        took = f"{found.full_s:.2f} s | {found.full_cpu_s:.2f} s | {found.statements:,} | {found.records:,}"
        print(f"| {nodes:,} | {queued:,} | {took} | {found.first_s:.1f} s | {found.busy:.0%} |", flush=True)
    with object_store_server() as s3, tempfile.TemporaryDirectory() as folder:
        report(s3, Path(folder), SIZES)


if __name__ == "__main__":
    main()
