"""Nodes with a custom resource are added, drained and killed under a job that asks for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from cluster import embedded
from cluster.embedded import Head
from service.client import ApiError, Client
from tests.cluster.test_nodes import own_ip
from tests.waiting import until
from tests.workloads.ray_paced import end_node, hold, one_process, orders
from workloads.record import RunFolder
from workloads.spec import JobSpec

pytestmark = [pytest.mark.ray, pytest.mark.soak]
ROOT = Path(__file__).parents[2]
STEPS = 200
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_"))}
CLEAN |= {"PYTHONPATH": str(ROOT)}  # workers import `ray_paced`

DRIVER = """
import sys
from workloads import ray_train, run
ray_train.RESIZE_S, ray_train.WORKER = 1.0, "tests.workloads.ray_paced:paced"
sys.exit(run.main())
"""
NODES = """
import json, sys
from pathlib import Path
from cluster import embedded
embedded.connect(Path(sys.argv[1]))
import ray
print(json.dumps({node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}))
"""


def manta(home: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", "--home", str(home), *arguments]


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """An installation that others may join; no node of it has the custom resource yet."""
    home = tmp_path_factory.mktemp("h")
    subprocess.run(manta(home, "up", "--cpus", "2", "--nodes-at", own_ip()), env=CLEAN, check=True, timeout=180)
    try:
        head = embedded.read(home)
        assert head is not None
        yield head
    finally:
        subprocess.run(manta(home, "down"), env=CLEAN, check=True, timeout=180)


@contextmanager
def node(head: Head, racks: int) -> Iterator[psutil.Process]:
    """Another machine of the installation, as its owner adds it."""
    words = manta(head.home, "cluster", "add-node", "--cpus", "4", "--gpus", "0", "--resource", f"rack={racks}")
    with open(head.home / "nodes.log", "ab") as log:
        process = subprocess.Popen([*words, "--drain", "10"], env=CLEAN, stdout=log, stderr=log, start_new_session=True)
    try:
        yield psutil.Process(process.pid)
    finally:
        end_node(psutil.Process(process.pid))
        process.wait()


def nodes(head: Head) -> dict[str, dict[str, float]]:
    """Resources by the id of the node."""
    words = [sys.executable, "-c", NODES, str(head.home)]
    found: dict[str, dict[str, float]] = json.loads(
        subprocess.run(words, env=CLEAN, capture_output=True, text=True, timeout=120, check=True).stdout
    )
    return found


def racks(head: Head) -> float:
    return sum(resources.get("rack", 0) for resources in nodes(head).values())


def told(run: RunFolder, kind: str) -> list[str]:
    return [event["message"] for event in run.read_events() if event["kind"] == kind]


def submit_to_ray(head: Head, spec: JobSpec, job_id: str) -> None:
    """By `ray job submit`, with a driver that looks for more room each second and whose workers can be held."""
    path = head.home / f"{job_id}.json"
    path.write_text(spec.model_dump_json())
    variables = {"PYTHONPATH": str(ROOT), "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"}
    words = ["ray", "job", "submit", "--no-wait", "--submission-id", job_id]
    words += ["--runtime-env-json", json.dumps({"env_vars": variables}), "--", sys.executable, "-c", DRIVER, str(path)]
    environment = CLEAN | embedded.environment(head)
    subprocess.run(words, env=environment, check=True, capture_output=True, timeout=60)


def test_an_elastic_job_goes_where_its_resource_comes_and_goes(
    head: Head, toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both groups of the resource are without GPUs; CPUs are left over, so the resource alone decides."""
    resources = {"workers": [1, 3], "custom_per_worker": {"rack": 1}}
    spec = toy_job(batch_size=12, micro_batch_size=2, resources=resources, epochs=None, steps=STEPS, log_steps=1)
    run = RunFolder(head.home / "runs" / "elastic")
    groups = ["1 workers", "3 workers", "1 workers", "3 workers", "1 workers"]

    def joined(times: int) -> None:
        until(lambda: told(run, "workers_joined") == groups[:times])
        made = max(orders(run), default=0)
        until(lambda: max(orders(run), default=0) > made)

    with ExitStack() as stays, Client(head.url) as client:
        document = toy_job(epochs=None, steps=4, resources={"custom_per_worker": {"rack": 1}}).model_dump(mode="json")
        with pytest.raises(ApiError, match="expected at most the 2 CPU and 0 rack of a node"):
            client.submit(document)
        stays.enter_context(node(head, 1))
        until(lambda: racks(head) == 1)

        run.path.mkdir(parents=True)
        (run.path / "pace").write_text("0.5")
        with hold(run, STEPS - 5):
            submit_to_ray(head, spec, "elastic")
            joined(1)
            with node(head, 2) as drained:
                joined(2)
                drained.send_signal(signal.SIGTERM)
                until(lambda: told(run, "preempted"))
                joined(3)
                until(lambda: not drained.is_running() or drained.status() == psutil.STATUS_ZOMBIE)
            with node(head, 2) as killed:
                joined(4)
                end_node(killed)
                joined(5)
            (run.path / "pace").unlink()
        job = client.wait("elastic")
        assert (job["state"], job["reason"], job["origin"]) == ("SUCCEEDED", None, "ray")
        assert (job["attempt"], job["progress"]["step"]) == (1, STEPS)

        landed = client.wait(client.submit(document)["id"])
        assert (landed["state"], landed["reason"]) == ("SUCCEEDED", None)
        token = {"Authorization": f"Bearer {head.token_path.read_text()}"}
        known = httpx.get(f"{head.dashboard_url}/api/jobs/{landed['id']}", headers=token, trust_env=False).json()
        (where,) = (one for one, has in nodes(head).items() if has.get("rack"))
        assert known["driver_node_id"] == where

    record = run.read_record()
    assert record is not None and (record.state, record.step) == ("SUCCEEDED", STEPS)
    alone = RunFolder(tmp_path / "alone")
    order = one_process(spec, alone, monkeypatch)
    seen = orders(run)
    assert sorted(seen) == list(range(1, STEPS + 1))
    assert all(batch == order[step - 1] for step, batches in seen.items() for batch in batches)
    curve, expected = list(run.read_metrics()), list(alone.read_metrics())
    assert [(point["step"], point["lr"]) for point in curve] == [(point["step"], point["lr"]) for point in expected]
    assert [point["loss"] for point in curve] == pytest.approx([point["loss"] for point in expected], rel=1e-3)
