"""`manta doctor`: looks at an installation and its cluster from outside, within seconds, without importing Ray."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import stat
import sys
from pathlib import Path

import httpx
import psutil
from pydantic import BaseModel

from cluster import embedded
from cluster.embedded import ClusterError, Head

TIMEOUT_S = 2.0
MIN_FREE_GB = 2.0
LOOPBACK = ("127.", "::1", "::ffff:127.")


class Finding(BaseModel):
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def examine(home: Path) -> list[Finding]:
    """Everything that can be found wrong in about two seconds; the cluster is looked at only when there is one."""
    findings = [_python(), *_packages(), _disk(home), _shared_memory(), _token(home)]
    try:
        head = embedded.read(home)
    except ClusterError as error:
        return [*findings, Finding(name="cluster", ok=False, detail=str(error), hint="remove the file")]
    if head is None:
        stale = (home / "head.json").exists()
        detail = "head.json is of a head that is gone" if stale else f"none runs for {home}"
        return [*findings, Finding(name="cluster", ok=not stale, detail=detail, hint="start it by `manta up`")]
    findings.append(Finding(name="cluster", ok=True, detail=f"pid {head.pid} at {head.address}"))
    return [*findings, *_environment(head), _jobs_api(head), _front_end(head), _sockets(head)]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(name="python", ok=sys.version_info >= (3, 11), detail=version, hint="use Python 3.11 or newer")


def _packages() -> list[Finding]:
    """Versions, and whether torchvision was built for this torch (timm imports it)."""
    wanted = {"ray": "2.60", "torch": "2.13", "timm": "1."}
    found = []
    for name, prefix in wanted.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        hint = f"expected {prefix}*: pip install -c constraints.txt -e ."
        found.append(Finding(name=name, ok=version.startswith(prefix), detail=version, hint=hint))
    return found


def _disk(home: Path) -> Finding:
    folder = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(folder).free / 1e9
    hint = f"free some, or set MANTA_HOME to another disk; {MIN_FREE_GB:g} GB are little enough"
    return Finding(name="disk", ok=free > MIN_FREE_GB, detail=f"{free:.1f} GB free at {folder}", hint=hint)


def _shared_memory() -> Finding:
    """Ray's object store lives there."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Finding(name="shared memory", ok=False, detail="/dev/shm is missing", hint="mount it; Ray needs it")
    free = shutil.disk_usage(shm).free / 1e9
    hint = "give the container more, e.g. --shm-size=2g"
    return Finding(name="shared memory", ok=free > 0.2, detail=f"{free:.1f} GB free in /dev/shm", hint=hint)


def _token(home: Path) -> Finding:
    path = home / "token"
    if not path.exists():
        return Finding(name="token", ok=True, detail="none yet: `manta up` makes one")
    mode = stat.S_IMODE(path.stat().st_mode)
    detail = f"{path} has mode {mode:04o}"
    return Finding(name="token", ok=mode & 0o077 == 0, detail=detail, hint=f"others can read it: chmod 600 {path}")


def _environment(head: Head) -> list[Finding]:
    """Variables of the caller's shell that would send `ray` commands elsewhere, or without the token."""
    right = embedded.environment(head)
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    wrong = [f"{n}={os.environ[n]}, expected {right[n]}" for n in names if os.environ.get(n, right[n]) != right[n]]
    detail = "; ".join(wrong) or "fits the cluster"
    return [Finding(name="environment", ok=not wrong, detail=detail, hint='eval "$(manta env)", or unset them')]


def _jobs_api(head: Head) -> Finding:
    try:
        embedded.probe(head)
    except ClusterError as error:
        return Finding(name="jobs api", ok=False, detail=str(error), hint="`manta down`, then `manta up`")
    return Finding(name="jobs api", ok=True, detail=f"{head.dashboard_url} takes the token")


def _front_end(head: Head) -> Finding:
    try:
        answer = httpx.get(f"{head.url}/readyz", timeout=TIMEOUT_S, trust_env=False)
        ok, detail = answer.status_code == 200, f"{head.url}/readyz answers {answer.status_code} {answer.text[:200]}"
    except httpx.HTTPError as error:
        ok, detail = False, f"{head.url} does not answer: {error}"
    return Finding(
        name="service", ok=ok, detail=detail, hint=f"see {head.home / 'head.log'}; `manta down`, then `manta up`"
    )


def listening(pid: int) -> list[tuple[str, str, int]]:
    """(process, address, port) of every listening socket of a process tree that is not on loopback."""
    leader = psutil.Process(pid)
    found = []
    for process in [leader, *leader.children(recursive=True)]:
        try:
            sockets = process.net_connections(kind="inet")
            name = process.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found += [
            (name, s.laddr.ip, s.laddr.port)
            for s in sockets
            if s.status == psutil.CONN_LISTEN and not s.laddr.ip.startswith(LOOPBACK)
        ]
    return found


def _sockets(head: Head) -> Finding:
    """Serve's replicas open an internal port on all interfaces, which Ray hard-codes and the token guards."""
    if head.ip != embedded.LOOPBACK:
        detail = f"other machines may join at {head.address}: see that a firewall lets in them alone"
        return Finding(name="sockets", ok=True, detail=detail)
    ours = None if head.http_host.startswith(LOOPBACK) else head.http_port  # opened on request, and asks for tokens
    found = listening(head.pid)
    open_to_all = [(name, ip, port) for name, ip, port in found if "ServeReplica" not in name and port != ours]
    detail = "; ".join(f"{name} on {ip}:{port}" for name, ip, port in open_to_all) or "all on loopback"
    return Finding(
        name="sockets", ok=not open_to_all, detail=detail, hint="these are reachable from outside: report it"
    )
