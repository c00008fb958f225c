"""SIGKILL of the service, of its reconciler in the critical section, of Ray's head and of PostgreSQL, and what must be
true afterwards of every job that was submitted meanwhile.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster import embedded
from tests.faults.brief import TOLD
from tests.faults.doomed import POINTS
from tests.faults.installed import ANSWER_S, Installation, Postgres, installation
from tests.faults.ray_faults import below
from tests.faults.table import KillRow
from tests.service.world import BODY
from tests.waiting import until

SETTLE_S = 900.0  # in which the last job has ended
EPOCHS = 30  # of 0.1 s: as long as Ray takes to start a job, so that kills meet jobs at work too


@dataclass(frozen=True)
class Kill:
    """Who is killed.

    Attributes:
        name: in the table.
        strike: kills and brings back, while a burst of jobs is submitted.
        prepare: what has to be in place before the burst; gets its size.
        spread_s: over which the burst is submitted.
    """

    name: str
    strike: Callable[[Installation, random.Random], None]
    prepare: Callable[[Installation, random.Random, int], None] = lambda *_: None
    spread_s: float = 1.0


def _service(installed: Installation, _: random.Random) -> None:
    installed.kill()


SERVICE = Kill("service", _service)


def of_reconciler(point: str) -> Kill:
    """At one of `doomed.POINTS` of the submission to Ray of some job of the burst."""

    def prepare(installed: Installation, rng: random.Random, jobs: int) -> None:
        (installed.home / f"die-{point}").write_text(str(rng.randrange(jobs)))

    def strike(installed: Installation, _: random.Random) -> None:
        installed.killed()

    return Kill("reconciler", strike, prepare)


RECONCILER = [of_reconciler(point) for point in POINTS]


def _head(installed: Installation, rng: random.Random) -> None:
    """While a job is at work; Ray forgets all. The service takes jobs without it until it is told of the next one."""
    until(lambda: at_work(installed), "a job is at work")
    time.sleep(rng.uniform(0, 1))
    leader = psutil.Process(installed.head.pid)
    (gcs,) = below(leader, "gcs_server")
    gcs.kill()
    until(lambda: not installed.head.alive() or leader.status() == psutil.STATUS_ZOMBIE, "the head ends")
    embedded.stop(installed.head)
    installed.head = embedded.start(installed.head.home, num_cpus=installed.head.num_cpus)
    installed.stop()
    installed.start()


HEAD = Kill("Ray's head", _head, spread_s=20.0)


def at_work(installed: Installation) -> bool:
    told = [path.read_text() for path in (installed.home / "runs").glob(f"*/{TOLD}")]
    return any("began" in lines and "ended" not in lines for lines in told)


def of_postgres(server: Postgres) -> Kill:
    def strike(_: Installation, rng: random.Random) -> None:
        server.kill()
        time.sleep(rng.uniform(0, 2))
        server.start()

    return Kill("PostgreSQL", strike)


class Clients:
    """Submit each job under a key of its own, again and again until it is accepted."""

    def __init__(self, url: str, epochs: int) -> None:
        self._url, self._body = url, BODY | {"epochs": epochs}
        self.accepted: dict[str, str] = {}  # key -> job id
        self.answers: Counter[str] = Counter()

    def submit(self, key: str, wait_s: float) -> None:
        time.sleep(wait_s)
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            try:
                headers = {"Idempotency-Key": key}
                answer = httpx.post(
                    f"{self._url}/v1/jobs",
                    json=self._body | {"name": key},
                    headers=headers,
                    timeout=30,
                    trust_env=False,
                )
            except httpx.TransportError:
                self.answers["none"] += 1
            else:
                self.answers[str(answer.status_code)] += 1
                if answer.status_code in (200, 201):
                    self.accepted[key] = answer.json()["id"]
                    return
                assert answer.status_code == 503, answer.text
                assert answer.json()["retryable"] and answer.headers["Retry-After"]
            time.sleep(0.2)
        raise AssertionError(f"{key} was not accepted in {ANSWER_S:g} s")


def ordeal(installed: Installation, kills: list[Kill], jobs: int, rng: random.Random, epochs: int = 1) -> KillRow:
    """Submits jobs in as many bursts as there are kills, one within each, and waits for the last job.

    Args:
        installed: that runs.
        kills: in this order.
        jobs: a multiple of their number.
        rng: decides the moments.
        epochs: of each job, `brief.EPOCH_S` each.

    Raises:
        AssertionError: a job was lost, made twice, ended otherwise than its run, or worked twice.
    """
    began = time.monotonic()
    installed.get("/healthz")
    clients, burst = Clients(installed.url, epochs), jobs // len(kills)
    with ThreadPoolExecutor(burst) as threads:
        for n, kill in enumerate(kills):
            kill.prepare(installed, rng, burst)
            waits = [rng.uniform(0, kill.spread_s) for _ in range(burst)]
            sent = [threads.submit(clients.submit, f"burst-{n}-{i}", wait) for i, wait in enumerate(waits)]
            time.sleep(rng.uniform(0, 1))
            kill.strike(installed, rng)
            for one in sent:
                one.result()
    deadline = time.monotonic() + SETTLE_S
    while unfinished(found := installed.get("/v1/jobs?limit=500")["jobs"]):
        assert time.monotonic() < deadline, f"not settled: {unfinished(found)}"
        time.sleep(0.5)
    told = [checked(installed, job) for job in found]
    assert sorted(job["id"] for job in found) == sorted(clients.accepted.values()), "the table has other jobs"
    assert {job["name"]: job["id"] for job in found} == clients.accepted and len(found) == jobs
    return KillRow(
        kill=", ".join(dict.fromkeys(kill.name for kill in kills)),
        kills=len(kills),
        jobs=jobs,
        unanswered=clients.answers["none"],
        refused=clients.answers["503"],
        known=clients.answers["200"],
        succeeded=sum(job["state"] == "SUCCEEDED" for job in found),
        attempts=sum(job["attempt"] for job in found),
        processes=sum(lines["process"] for lines in told),
        began=sum(lines["began"] for lines in told),
        ended=sum(lines["ended"] for lines in told),
        seconds=round(time.monotonic() - began),
    )


def on_own_cluster(kills: list[Kill], home: Path, jobs: int, rng: random.Random, database_url: str = "") -> KillRow:
    """`ordeal` of an installation with a head of its own, which may be among those that are killed."""
    head = embedded.start(home / "cluster", num_cpus=4)
    with installation(home / "home", head, database_url) as installed:
        try:
            return ordeal(installed, kills, jobs, rng, EPOCHS)
        finally:
            embedded.stop(installed.head)


def unfinished(jobs: list[dict[str, Any]]) -> dict[str, str]:
    return {job["id"]: job["state"] for job in jobs if job["state"] not in ("SUCCEEDED", "FAILED", "CANCELLED")}


def checked(installed: Installation, job: dict[str, Any]) -> Counter[str]:
    """What the processes of a job told, once what the service says of it is found to be true."""
    told = Counter((installed.home / "runs" / job["id"] / TOLD).read_text().splitlines())
    assert (job["state"], job["reason"]) == ("SUCCEEDED", None), job
    assert told["ended"] == 1, (job["id"], told)
    assert told["began"] >= 1 and not told["two at once"], (job["id"], told)
    kinds = [(event["kind"], event["message"]) for event in installed.get(f"/v1/jobs/{job['id']}/events")["events"]]
    starting = [message for kind, message in kinds if kind == "starting"]
    assert starting == [f"attempt {n + 1}" for n in range(job["attempt"])], kinds
    assert kinds[0][0] == "queued" and [kind for kind, _ in kinds].count("succeeded") == 1, kinds
    assert kinds[-1][0] == "succeeded", kinds
    return told
