"""The head dies under a running job and comes back with the state that Redis kept, as KubeRay does it by a new pod."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster import embedded
from service.client import Client
from tests.cluster.test_nodes import own_ip
from tests.cluster.test_serve_config import CONFIG, TOKEN
from tests.waiting import until
from workloads.record import RunFolder
from workloads.spec import JobSpec

pytestmark = [pytest.mark.ray, pytest.mark.soak]


def free_ports(ip: str, n: int) -> list[int]:
    sockets = [socket.create_server((ip, 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Redis on loopback that asks for a password; what Ray reads of it."""
    if shutil.which("redis-server") is None:
        pytest.skip("Redis is not installed: apt-get install redis-server")
    (port,), password = free_ports("127.0.0.1", 1), secrets.token_hex(16)
    words = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--requirepass", password]
    process = subprocess.Popen([*words, "--dir", tmp_path, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
    yield {
        "RAY_REDIS_ADDRESS": f"127.0.0.1:{port}",
        "REDIS_PASSWORD": password,
        "RAY_external_storage_namespace": "fleet",
    }
    process.terminate()
    process.wait(10)


class HeadPod:
    """A head as KubeRay starts it: fixed ports, no CPUs, its state in Redis."""

    def __init__(self, home: Path, redis: dict[str, str]) -> None:
        self.ip = own_ip()
        self.gcs, self.dashboard, self.http, *self.more = free_ports(self.ip, 7)
        self.home, self.folders = home, list[Path]()
        (home / "token").write_text(secrets.token_hex(32))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_"))}
        self.environment = (
            clean
            | redis
            | embedded.mode(self.ip)
            | {
                "RAY_AUTH_TOKEN_PATH": str(home / "token"),
                "MANTA_HOME": str(home),
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
                "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as KubeRay sets it on workers
                "AUTOSCALER_METRIC_PORT": str(self.more[0]),
                "DASHBOARD_METRIC_PORT": str(self.more[1]),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
        )

    def start(self) -> subprocess.Popen[bytes]:
        """With a new folder for its sockets, as a pod has an empty /tmp."""
        self.folders.append(Path("/tmp") / f"manta-{secrets.token_hex(4)}")
        words = ["--head", f"--port={self.gcs}", "--num-cpus=0", f"--temp-dir={self.folders[-1]}"]
        words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"]
        words += [f"--dashboard-agent-listen-port={self.more[2]}", f"--ray-client-server-port={self.more[3]}"]
        return self._ray(*words, f"--redis-password={self.environment['REDIS_PASSWORD']}")

    def worker(self) -> subprocess.Popen[bytes]:
        return self._ray(f"--address={self.ip}:{self.gcs}", "--num-cpus=2")

    def _ray(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address", self.ip, "--min-worker-port=0", "--max-worker-port=0", *words]
        with open(self.home / "ray.log", "ab") as log:
            return subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd=self.home
            )

    def api(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {(self.home / 'token').read_text()}"}
        url = f"http://127.0.0.1:{self.dashboard}{path}"
        return httpx.request(method, url, headers=headers, timeout=30, trust_env=False, **options)

    def answers(self, path: str) -> bool:
        try:
            return self.api("GET", path).status_code == 200
        except httpx.TransportError:
            return False


def killed(process: subprocess.Popen[bytes]) -> None:
    """All of a node at once, as when its machine goes."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(20)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_job_outlives_its_head(
    redis: dict[str, str], tmp_path_factory: pytest.TempPathFactory, toy_job: Callable[..., JobSpec]
) -> None:
    home = tmp_path_factory.mktemp("h")
    pod = HeadPod(home, redis)
    config = yaml.safe_load(CONFIG.read_text())
    (home / "admin_token").write_text(TOKEN)
    config["applications"][0]["runtime_env"]["env_vars"] |= {
        "MANTA_HOME": str(home),
        "MANTA_RAY_DASHBOARD_URL": f"http://127.0.0.1:{pod.dashboard}",
        "MANTA_FIRST_ADMIN_TOKEN_FILE": str(home / "admin_token"),
        "MANTA_ALLOWED_ROOTS": "*",
        "MANTA_CLUSTER_NODES": '[{"count": 1, "resources": {"CPU": 2}}]',
    }
    config["http_options"] = {"host": "127.0.0.1", "port": pod.http}
    url = f"http://127.0.0.1:{pod.http}"
    processes = [pod.start()]
    try:
        until(lambda: pod.answers("/api/serve/applications/"), "the head is up")
        processes.append(pod.worker())
        pod.api("PUT", "/api/serve/applications/", json=config).raise_for_status()
        until(lambda: ready(url), "the front end takes requests")
        with Client(url, token=TOKEN) as client:
            spec = toy_job(epochs=None, steps=30000, checkpoint={"every_steps": 200})
            job_id = client.submit(spec.model_dump(mode="json"))["id"]
            run = RunFolder(home / "runs" / job_id)
            until(lambda: client.job(job_id)["progress"]["step"] > 400, "it trains on the worker")
            before = client.job(job_id)["progress"]["step"]
            killed(processes[0])
            assert not ready(url)
            processes.append(pod.start())
            until(lambda: ready(url), "the front end is back by itself: Serve's state was kept")
            assert processes[1].poll() is None, "the worker waited for the head"
            until(lambda: client.job(job_id)["progress"]["step"] > before, "the job goes on")
            client.cancel(job_id)
            job = client.wait(job_id)
        record = run.read_record()
        assert record is not None
        assert (job["state"], record.state) == ("CANCELLED", "STOPPED") and record.step > before
    finally:
        for process in reversed(processes):
            killed(process)
        for folder in pod.folders:
            shutil.rmtree(folder, ignore_errors=True)
