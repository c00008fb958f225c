"""The front end under load: `python -m tests.benchmarks.service_load`.

Ten thousand jobs in the table, and a burst of two hundred submissions, on SQLite and on PostgreSQL where there is one.
The app, its database, its run folders and the reconciler are the real ones, under uvicorn in a process of its own;
Ray is made up: a run takes a moment and writes its record.
"""

from __future__ import annotations

import random
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx

from service.packing import Hardware, Node
from service.ray_jobs import RayStatus, submission_id
from service.settings import Settings
from service.store import Job, ModelVersion, Project, Store
from tests import postgres
from tests.benchmarks import apart
from tests.benchmarks.fleet import SPEC
from tests.benchmarks.service import _spec
from tests.benchmarks.table import Row, markdown
from workloads.record import Record, RunFolder

JOBS = 10_000
SUBMISSIONS, CLIENTS = 200, 32
CPUS = 8  # of the made-up cluster: so many jobs run at once
LOOKS = 60  # requests of each kind
WANTED_MS = 100.0


class Engine:
    """Stands in for RayJobs: runs succeed after a moment. Only the reconciler's thread calls what changes it."""

    def __init__(self, settings: Settings, run_s: float) -> None:
        self._settings, self._run_s = settings, run_s
        self._known: dict[str, RayStatus] = {}
        self._running: dict[str, tuple[str, int, float]] = {}
        self.submitted: list[str] = []
        self.most = 0  # drivers at once, each of which Ray's head holds

    def statuses(self) -> dict[str, RayStatus]:
        for name, (job_id, attempt, ends_at) in list(self._running.items()):
            if time.time() >= ends_at:
                self._known[name] = "SUCCEEDED"
                write_record(RunFolder(self._settings.runs / job_id), "SUCCEEDED", attempt)
                del self._running[name]
        return dict(self._known)

    def hardware(self) -> Hardware:
        return Hardware([Node({"CPU": float(CPUS)})])

    def submit(self, job_id: str, attempt: int) -> None:
        name = submission_id(job_id, attempt)
        self.submitted.append(name)
        self._known[name], self._running[name] = "RUNNING", (job_id, attempt, time.time() + self._run_s)
        self.most = max(self.most, len(self._running))

    def stop(self, job_id: str, attempt: int) -> None:
        raise AssertionError("nobody asks for it")


class NoDeployments:
    def reconcile(self) -> None:
        pass


def write_record(run: RunFolder, state: str, attempt: int = 1) -> None:
    now = time.time()
    times = {"started_at": now, "updated_at": now, "finished_at": now}
    record = Record(job_id=run.path.name, state=state, attempt=attempt, host="elsewhere", **times)  # type: ignore[arg-type]
    run.path.mkdir(parents=True, exist_ok=True)
    scratch = run.path / ".record.json.tmp"
    scratch.write_text(record.model_dump_json())
    scratch.replace(run.record)  # without the fsync of the product: somebody may read it at this moment


def fill(home: str, url: str, jobs: int) -> None:
    """A table after months: most have run and left a folder and a model, some were paused before that."""
    settings = Settings(home=Path(home), database_url=url)
    document, rng = SPEC.model_dump(mode="json"), random.Random(0)
    with closing(Store(settings.database)) as store, store.session() as session:
        session.add(Project(name="vision"))
        for i in range(jobs):
            state = rng.choices(("SUCCEEDED", "FAILED", "CANCELLED", "PAUSED"), (90, 5, 4, 1))[0]
            ran = state != "PAUSED"  # while it waited
            job_id, project = f"job-{i:06d}", rng.choice(("default", "vision"))
            numbers = {"attempt": int(ran), "step": 1000 * ran, "cpus": 1.0}
            session.add(
                Job(id=job_id, name="load", spec=document, origin="rest", state=state, project=project, **numbers)  # type: ignore[arg-type]
            )
            if ran:
                run = RunFolder(settings.runs / job_id)
                write_record(run, "SUCCEEDED" if state == "SUCCEEDED" else "FAILED")
                run.evaluations.write_text('[{"name": "knn", "label": "knn", "metric": "accuracy", "mean": 0.9}]')
            if state == "SUCCEEDED":
                session.add(
                    ModelVersion(
                        name=f"m{i % 100}", version=i, kind="encoder", job_id=job_id, source="artifact", card={}
                    )
                )


def serve(home: str, url: str, run_s: float) -> dict[str, Any]:
    """The front end, until a file `stop` appears in its home; its port is in the file `port`.

    Returns:
        what the made-up Ray saw: `submitted`, and the `most` runs at once.
    """
    import uvicorn

    from service.app import build
    from service.parts import build_parts

    settings = Settings(home=Path(home), database_url=url)
    engine = Engine(settings, run_s)
    parts = build_parts(settings, ray=engine, deployments=NoDeployments())  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(build(settings, parts), log_level="warning", access_log=False))

    def until_stopped() -> None:
        while not (settings.home / "stop").exists():
            time.sleep(0.1)
        server.should_exit = True

    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        port = settings.home / "port"
        port.with_suffix(".tmp").write_text(str(listener.getsockname()[1]))
        port.with_suffix(".tmp").rename(port)
        threading.Thread(target=until_stopped, daemon=True).start()
        server.run(sockets=[listener])
    return {"submitted": engine.submitted, "most": engine.most}


@contextmanager
def served(home: Path, url: str, run_s: float = 0.05) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The address of a front end in a process of its own, and what ends it and tells what its Ray saw."""
    with apart.started(serve, home=str(home), url=url, run_s=run_s) as result:

        def ended() -> Any:
            (home / "stop").touch()
            return result()

        deadline = time.monotonic() + apart.LIMIT_S
        while not (home / "port").exists() or not _ready(address := f"http://127.0.0.1:{(home / 'port').read_text()}"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no front end after {apart.LIMIT_S:g} s")
            time.sleep(0.1)
        yield address, ended


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def looks(address: str, jobs: int) -> dict[str, float]:
    """p95 of requests one after another, in milliseconds, by what they ask for.

    Raises:
        AssertionError: an answer is not what the table holds.
    """
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        middle = client.get("/v1/jobs?limit=1").json()["next"] - jobs // 2
        ids = [job["id"] for job in client.get("/v1/jobs").json()["jobs"]]
        asked: dict[str, tuple[list[str], int | None]] = {  # paths in turns, and how many jobs an answer has
            "newest": (["/v1/jobs"], 50),
            "by state": (["/v1/jobs?state=FAILED"], None),
            "by project": (["/v1/jobs?project=vision"], None),
            "by both": (["/v1/jobs?state=PAUSED&project=vision"], None),
            "from the middle": ([f"/v1/jobs?cursor={middle - 7 * i}" for i in range(LOOKS)], 50),
            "500": (["/v1/jobs?limit=500"], 500),
            "one job": ([f"/v1/jobs/{job_id}" for job_id in ids], None),
        }
        found: dict[str, float] = {}
        for name, (paths, expected) in asked.items():
            took = []
            for i in range(LOOKS):
                began = time.perf_counter()
                answer = client.get(paths[i % len(paths)])
                took.append(1e3 * (time.perf_counter() - began))
                assert answer.status_code == 200, answer.text
                assert expected is None or len(answer.json()["jobs"]) == min(expected, jobs), name
            found[name] = p95(took)
    return found


def burst(address: str, shards: str) -> dict[str, Any]:
    """Submits jobs with keys from many clients at once, every tenth of them twice, and waits until all have ended.

    Returns:
        `rate` of acceptance (jobs/s), `p95_ms` of a submission, `ids` that were answered.

    Raises:
        AssertionError: one was refused, lost, or there twice.
    """

    def post(i: int) -> tuple[str, float]:
        body, key = _spec(shards, name=f"burst-{i}"), {"Idempotency-Key": f"burst-{i}"}
        began = time.perf_counter()
        answer = pool_of[i % CLIENTS].post("/v1/jobs", json=body, headers=key)
        took = 1e3 * (time.perf_counter() - began)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()["id"], took

    order = sorted([*range(SUBMISSIONS), *range(0, SUBMISSIONS, 10)])
    pool_of = [httpx.Client(base_url=address, trust_env=False, timeout=120) for _ in range(CLIENTS)]
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            began = time.perf_counter()
            answers = list(pool.map(post, order))
            seconds = time.perf_counter() - began
        ids = {i: job_id for i, (job_id, _) in zip(order, answers, strict=True)}
        assert len({job_id for job_id, _ in answers}) == SUBMISSIONS == len(set(ids.values())), "one is there twice"
        states: dict[str, str] = {}
        while len(states) < SUBMISSIONS or set(states.values()) != {"SUCCEEDED"}:
            page = pool_of[0].get("/v1/jobs?limit=500")
            assert page.status_code == 200, page.text
            states = {job["id"]: job["state"] for job in page.json()["jobs"] if job["name"].startswith("burst-")}
            assert not set(states.values()) & {"FAILED", "CANCELLED"}
            time.sleep(1.0)  # seldom: it takes from the service
        assert states.keys() == set(ids.values()), "one was lost, or is there twice"
    finally:
        for client in pool_of:
            client.close()
    return {"rate": len(order) / seconds, "p95_ms": p95([took for _, took in answers]), "ids": sorted(states)}


def round_s(home: str, url: str, rounds: int = 7) -> float:
    """Seconds of a round of the reconciler over the table, the median."""
    from service.reconciler import Reconciler
    from service.registry import Registry

    settings = Settings(home=Path(home), database_url=url)
    with closing(Store(settings.database)) as store:
        registry, engine = Registry(settings, store), Engine(settings, 1.0)
        reconciler = Reconciler(settings, store, engine, registry, lambda: None, releases=None)  # type: ignore[arg-type]
        took = []
        for _ in range(rounds):
            began = time.perf_counter()
            reconciler.round()
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def measure(folder: Path, shards: str, url: str, jobs: int = JOBS) -> dict[str, Any]:
    """Of one empty database: what a look at a full table costs, then a burst on top of it."""
    folder.mkdir(parents=True)
    apart.run(fill, home=str(folder), url=url, jobs=jobs)
    seconds = apart.run(round_s, home=str(folder), url=url)
    with served(folder, url) as (address, ended):
        found = looks(address, jobs)
        answered = burst(address, shards)
        seen = ended()
    assert sorted(seen["submitted"]) == answered["ids"], "an attempt was lost, or submitted twice"
    return {"looks": found, "round_s": seconds, "most": seen["most"], **answered}


def rows(folder: Path, shards: str) -> list[Row]:
    """(what, measured, wanted, reached) on each database that there is."""
    found = []
    server = nullcontext() if postgres.missing() else postgres.running()
    with server as running:
        databases = {"SQLite": ""}
        if running is not None:
            databases["PostgreSQL"] = running.url(running.create())
        for name, url in databases.items():
            got = measure(folder / f"load-{name}", shards, url)
            lists = {what: ms for what, ms in got["looks"].items() if what not in ("500", "one job")}
            worst = max(lists, key=lambda what: lists[what])
            where = f"load: {JOBS:,} jobs on {name}:"
            words = f"{got['looks']['newest']:.0f} ms; worst, {worst}: {lists[worst]:.0f} ms"
            found += [
                (f"{where} p95 of a page of 50", words, f"< {WANTED_MS:.0f} ms", max(lists.values()) < WANTED_MS),
                (f"{where} p95 of a page of 500; of one job", _ms(got["looks"], "500", "one job"), "", None),
                (f"{where} a round of the reconciler", f"{1e3 * got['round_s']:.0f} ms", "", None),
                (
                    f"load: {SUBMISSIONS} jobs of {CLIENTS} clients at once on {name}: lost, twice; runs at once",
                    f"0, 0; {got['most']}",  # `burst` and `measure` assert it
                    f"0, 0; <= {CPUS}",
                    got["most"] <= CPUS,
                ),
                (
                    "load: the same: accepted, p95 of a submission",
                    f"{got['rate']:.0f} jobs/s, {got['p95_ms']:.0f} ms",
                    "",
                    None,
                ),
            ]
    return found


def _ms(found: dict[str, float], *names: str) -> str:
    return "; ".join(f"{found[name]:.0f} ms" for name in names)


def main() -> None:
    from tests.benchmarks import service_load  # under its own name, by which other processes find it
    from workloads.data.pack import pack_digits

    with tempfile.TemporaryDirectory() as name:
        pack_digits(Path(name) / "digits")
        for row in service_load.rows(Path(name), f"{name}/digits/train-{{000000..000001}}.tar"):
            print(markdown(row), flush=True)


if __name__ == "__main__":
    main()
