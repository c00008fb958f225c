"""SIGKILL of the service, of its reconciler in the critical section, of Ray's head and of PostgreSQL, and what must be
true afterwards of every job that was submitted meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster import embedded
from cluster.embedded import Head
from tests.faults.brief import TOLD
from tests.faults.doomed import PID, POINTS, ROOT
from tests.faults.ray_faults import below
from tests.faults.table import KillRow
from tests.faults.trial import until
from tests.service.world import BODY

ACCEPT_S = 120.0  # in which a client that tries again is answered
SETTLE_S = 900.0  # in which the last job has ended
AS_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups") if os.geteuid() == 0 else ()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Postgres:
    """A server whose first process is ours, so that it can be killed; it writes to disk as it does by default."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        words = ["initdb", "--pgdata", folder / "data", "--auth", "trust", "--username", "manta"]
        subprocess.run([*AS_NOBODY, *words], check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://manta@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Again and again while the processes of a killed one still hold its memory."""
        words = ["postgres", "-D", self._folder / "data", "-p", str(self._port), "-k", self._folder]
        deadline = time.monotonic() + 60
        while True:
            with open(self._folder.with_suffix(".log"), "ab") as log:
                self._process = subprocess.Popen([*AS_NOBODY, *words], stdout=log, stderr=log, cwd="/")
            until(lambda: self._process.poll() is not None or self._answers(), "PostgreSQL answers or ends", 60)
            if self._process.poll() is None:
                return
            assert time.monotonic() < deadline, "PostgreSQL does not start; its log is beside its folder"
            time.sleep(0.1)

    def _answers(self) -> bool:
        words = ["pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        return subprocess.run(words, timeout=10).returncode == 0

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._process.send_signal(number)
        self._process.wait(30)


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """In a folder under the system's temporary one, since socket paths are short."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if AS_NOBODY:
        shutil.chown(folder, "nobody", "nogroup")
    server = Postgres(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill(signal.SIGINT)
        shutil.rmtree(folder)
        folder.with_suffix(".log").unlink()


class Installation:
    """A home, Ray's head, and a service at one port whose process comes and goes."""

    def __init__(self, home: Path, head: Head, database_url: str = "") -> None:
        self.home, self.head = home, head
        self._database_url, self._port = database_url, free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        home.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_"))}
        ours = {
            "MANTA_HOME": str(self.home),
            "MANTA_RAY_DASHBOARD_URL": self.head.dashboard_url,
            "MANTA_DATABASE_URL": self._database_url,
            "PYTHONPATH": str(ROOT),
        }
        environment = clean | embedded.environment(self.head) | ours
        words = [sys.executable, "-m", "tests.faults.doomed", str(self._port)]
        with open(self.home / "service.txt", "ab") as log:
            self._keeper = subprocess.Popen(
                words, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.home
            )
        self._pid = self._next_pid(0)

    def _next_pid(self, before: int) -> int:
        """Of the service that came after another."""
        path, deadline = self.home / PID, time.monotonic() + SETTLE_S
        while not path.exists() or int(path.read_text()) == before:
            assert self._keeper.poll() is None, f"the service ended by itself; see {self.home}/service.txt"
            assert time.monotonic() < deadline, "the service was not killed"
            time.sleep(0.02)
        return int(path.read_text())

    def killed(self) -> None:
        """Returns when the service has died, of SIGKILL, and another has been started."""
        self._pid = self._next_pid(self._pid)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self.killed()

    def stop(self) -> None:
        """The service, and who starts it again."""
        os.killpg(self._keeper.pid, signal.SIGKILL)
        self._keeper.wait(30)
        (self.home / PID).unlink()

    def get(self, path: str) -> Any:
        """Asked again until it answers."""
        deadline = time.monotonic() + ACCEPT_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(self.url + path, timeout=30, trust_env=False)
                if answer.status_code == 200:
                    return answer.json()
            assert time.monotonic() < deadline, f"{path} is not answered"
            time.sleep(0.2)


@contextlib.contextmanager
def installation(home: Path, head: Head, database_url: str = "") -> Iterator[Installation]:
    """Whose service is ended with the block."""
    made = Installation(home, head, database_url)
    made.start()
    try:
        yield made
    finally:
        made.stop()


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
    until(lambda: not installed.head.alive() or leader.status() == psutil.STATUS_ZOMBIE, "the head ends", 60)
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
        deadline = time.monotonic() + ACCEPT_S
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
        raise AssertionError(f"{key} was not accepted in {ACCEPT_S:g} s")


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
