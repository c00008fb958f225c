"""The embedded cluster: one Ray head on this machine, on loopback unless other machines shall join it, with a token.

`start` makes it, `stop` ends exactly what `start` made, `connect` joins it. Every
variable that Ray, its workers, drivers and submitters need is set here and nowhere else:
a process in another mode than its cluster hangs without a message.

State is one file, `<home>/head.json`. The token lies beside it, readable by its owner only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
from pydantic import BaseModel

from cluster.job_environment import OF_JOBS, without_foreign

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 2.5  # a head goes in 2 s; what is left then is killed
PROBE_TIMEOUT_S = 2.0
READY = "Ray runtime started"
MODE = {  # read when ray is imported; a process in another mode than its cluster hangs
    "RAY_AUTH_MODE": "token",
    # The switch that keeps Ray on the address that it was given, on Linux too; without it everything listens on all
    # interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
LOOPBACK = "127.0.0.1"


_children: dict[int, subprocess.Popen[bytes]] = {}  # heads of this process: Python warns when one is dropped alive


class ClusterError(RuntimeError):
    """The cluster cannot be started, reached or trusted: what was got, expected, and what to do."""


class Head(BaseModel):
    """What `head.json` holds."""

    pid: int  # of `ray start --block`, the leader of its own session
    created: float  # its creation time: a pid alone may have been given to another process
    home: Path
    temp_dir: Path
    token_path: Path
    ip: str = LOOPBACK  # of Ray on this machine; any other: machines may join, see `cluster.nodes`
    address: str  # of the GCS, ip:port
    dashboard_url: str
    http_host: str = "127.0.0.1"  # of our front end
    http_port: int
    metric_ports: tuple[int, int]
    num_cpus: int

    @property
    def url(self) -> str:
        """Of the front end, as this machine reaches it."""
        return f"http://{'127.0.0.1' if self.http_host == '0.0.0.0' else self.http_host}:{self.http_port}"

    def alive(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.created) < 1.0
        except psutil.NoSuchProcess:
            return False


def mode(ip: str) -> dict[str, str]:
    """What must be set before ray is imported."""
    return MODE | ({} if ip == LOOPBACK else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"})


def environment(head: Head) -> dict[str, str]:
    """What every process on this machine that talks to the cluster must have in its environment."""
    gcs, dashboard = head.metric_ports
    alone = {"GLOO_SOCKET_IFNAME": "lo", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if head.ip == LOOPBACK else {}
    return {
        **mode(head.ip),
        **alone,
        "MANTA_HOME": str(head.home),
        "RAY_AUTH_TOKEN_PATH": str(head.token_path),
        "RAY_ADDRESS": head.address,
        "RAY_API_SERVER_ADDRESS": head.dashboard_url,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # default 30: `stop` would take that long
        "RAY_USAGE_STATS_ENABLED": "0",
        "AUTOSCALER_METRIC_PORT": str(gcs),
        "DASHBOARD_METRIC_PORT": str(dashboard),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads cost four times on a busy machine
        "RAY_worker_niceness": "0",  # default 15: whatever else runs takes the core from a training step, up to 5 %
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # by the replica's own port: an actor call makes a prediction 3 ms longer
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # default 4 MiB: reports, logs, images are larger
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",  # so that handles are awaited only; another thread costs 1.6 ms
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # default 2: a run ends up to that much later
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def read(home: Path) -> Head | None:
    """The head of this home, None where there is none or where it is gone."""
    try:
        head = Head.model_validate_json((home / "head.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ClusterError(f"{home / 'head.json'} cannot be read ({error}); remove it and run `manta up`") from error
    return head if head.alive() else None


def shell_exports(head: Head) -> str:
    """`export` lines for a shell in which `ray` commands are typed."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment(head).items())


def start(
    home: Path,
    *,
    ip: str = LOOPBACK,
    num_cpus: int | None = None,
    http_host: str = "127.0.0.1",
    http_port: int | None = None,
    credentials: Sequence[str] = OF_JOBS,
) -> Head:
    """Starts a head for this home and waits until it takes jobs, about 10 s.

    Args:
        home: the folder of the installation; made when missing.
        ip: address of this machine at which others may join; Ray then listens on all of its addresses.
        num_cpus: how many the cluster may give out; default: those of the machine, at least 2.
        http_host: address on which the front end will listen.
        http_port: its port; default: a free one.
        credentials: patterns of variables that jobs may have although they look like secrets.

    Raises:
        ClusterError: one runs already, or Ray did not start; what was started is ended again.
    """
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if running := read(home):
        raise ClusterError(f"a cluster of {home} runs already (pid {running.pid}); use it, or end it by `manta down`")
    token_path = _token(home)
    gcs, dashboard, client, agent, http, *metrics = _free_ports(7, ip)
    cpus = num_cpus or max(2, os.cpu_count() or 1)
    head = Head(
        pid=0,
        created=0.0,
        home=home,
        temp_dir=_temp_dir(home),
        token_path=token_path,
        ip=ip,
        address=f"{ip}:{gcs}",
        dashboard_url=f"http://127.0.0.1:{dashboard}",
        http_host=http_host,
        http_port=http_port or http,
        metric_ports=(metrics[0], metrics[1]),
        num_cpus=cpus,
    )
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", ip, "--dashboard-host", "127.0.0.1", "--port", str(gcs)]
    command += ["--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
    command += ["--dashboard-agent-listen-port", str(agent), "--temp-dir", str(head.temp_dir)]
    command += ["--num-cpus", str(cpus), "--min-worker-port", "0", "--max-worker-port", "0"]
    command += ["--include-log-monitor", "false"]  # which sends what workers print to drivers; ours ask for none
    log = home / "head.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            env=without_foreign(os.environ, credentials) | environment(head),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C at the terminal is ours to handle, not the head's
            cwd=home,
        )
    _children[process.pid] = process
    head = head.model_copy(update={"pid": process.pid, "created": psutil.Process(process.pid).create_time()})
    try:
        (home / "head.json").write_text(head.model_dump_json(indent=1))
        _wait_until_ready(head, process, log)
    except BaseException:
        stop(head)
        raise
    return head


def _wait_until_ready(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """The Jobs API answers before there is a node, so both are asked for."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        text = log.read_text(errors="replace")
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(text.splitlines()[-15:])
            raise ClusterError(f"Ray did not start (exit code {process.poll()}); the end of {log}:\n{tail}")
        if READY in text:
            with contextlib.suppress(ClusterError):
                probe(head)
                return
        time.sleep(0.1)


def stop(head: Head) -> None:
    """Ends the head and everything below it, and removes its traces; nothing else of the machine is touched."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if head.alive():
            leader = psutil.Process(head.pid)
            family = [leader, *leader.children(recursive=True)]
            leader.send_signal(signal.SIGTERM)
            _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
    if (child := _children.pop(head.pid, None)) is not None:
        child.wait()
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    (head.home / "head.json").unlink(missing_ok=True)


def probe(head: Head) -> None:
    """Asks the cluster whether it is there and takes our token, within seconds.

    Raises:
        ClusterError: what does not fit.
    """
    if not head.token_path.is_file():
        raise ClusterError(
            f"the token file {head.token_path} is missing; end the cluster by `manta down` and start it anew"
        )
    host, _, port = head.address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()
        headers = {"Authorization": f"Bearer {head.token_path.read_text().strip()}"}
        answer = httpx.get(f"{head.dashboard_url}/api/jobs/", headers=headers, timeout=PROBE_TIMEOUT_S, trust_env=False)
    except (OSError, httpx.HTTPError) as error:
        raise ClusterError(
            f"the cluster at {head.address} does not answer ({error}); end it by `manta down`, then `manta up`"
        ) from error
    if answer.status_code in (401, 403):
        raise ClusterError(
            f"the cluster refuses the token in {head.token_path}: it was started with another one; "
            "restore that file, or end the cluster by `manta down` and start it anew"
        )
    if answer.status_code != 200:
        raise ClusterError(
            f"the Jobs API of {head.dashboard_url} answers {answer.status_code}, expected 200; see head.log"
        )


def running(home: Path) -> Head:
    """The head of this home, probed.

    Raises:
        ClusterError: none runs, or mode, token or address do not fit.
    """
    head = read(home)
    if head is None:
        raise ClusterError(f"no cluster runs for {home}; start it by `manta up`")
    probe(head)
    return head


def connect(home: Path) -> Head:
    """Joins this process to the cluster of `home`; sets the environment before ray is imported.

    Raises:
        ClusterError: there is none, or mode, token or address do not fit.
    """
    head = running(home)
    late = [name for name, value in mode(head.ip).items() if "ray" in sys.modules and os.environ.get(name) != value]
    if late:
        raise ClusterError(
            f"ray was imported before {', '.join(late)} was set, so this process would hang; "
            'import ray after `connect`, or start the process under eval "$(manta env)"'
        )
    os.environ.update(environment(head))
    import ray

    if not ray.is_initialized():
        ray.init(address=head.address, _node_ip_address=head.ip, log_to_driver=False, logging_level=logging.WARNING)
    return head


def _token(home: Path) -> Path:
    """The token of this installation, made once."""
    path = home / "token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path


def _temp_dir(home: Path) -> Path:
    """Short, because Ray puts sockets 66 characters below it and Linux allows 107 in all."""
    name = "manta-" + hashlib.sha256(str(home).encode()).hexdigest()[:8]
    folder = Path(tempfile.gettempdir())
    return (folder if len(str(folder)) <= 25 else Path("/tmp")) / name


def _free_ports(n: int, ip: str) -> list[int]:
    """Free now; held open together so that none is given twice."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((ip, 0))) for _ in range(n)]
        return [s.getsockname()[1] for s in sockets]
