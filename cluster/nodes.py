"""Other machines of an installation: each joins the head that `manta up --nodes-at IP` started on one of them.

All that a machine needs is the home folder, which jobs need on every machine anyway: `head.json` in it says where the
head is, `token` beside it opens it. Ray's ports between the machines must be open to each other and to nobody else.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.embedded import LOOPBACK, PROBE_TIMEOUT_S, ClusterError, Head, mode
from cluster.embedded import environment as of_head
from cluster.job_environment import without_foreign

POLL_S = 0.5


def head_of(home: Path) -> Head:
    """The head that `home` tells of, on whatever machine.

    Raises:
        ClusterError: there is none, or none that others can join.
    """
    try:
        head = Head.model_validate_json((home / "head.json").read_text())
    except FileNotFoundError as error:
        raise ClusterError(
            f"{home} has no head.json; start the head by `manta up --nodes-at IP` in a shared folder"
        ) from error
    except (OSError, ValueError) as error:
        raise ClusterError(f"{home / 'head.json'} cannot be read ({error}); start the head again") from error
    if head.ip == LOOPBACK:
        raise ClusterError("the head is on loopback; end it by `manta down`, start it by `manta up --nodes-at IP`")
    if not os.access(home / "token", os.R_OK):
        raise ClusterError(f"{home / 'token'} cannot be read; join as the user who started the head")
    return head


def own_address(head: Head) -> str:
    """The address of this machine on the way to the head.

    Raises:
        ClusterError: there is no way, or nobody listens.
    """
    host, _, port = head.address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise ClusterError(
            f"the head at {head.address} does not answer ({error}); see that it runs, and that no firewall is between"
        ) from error


def command(
    head: Head, ip: str, *, cpus: int | None, gpus: int | None, custom: Mapping[str, float] | None = None
) -> list[str]:
    """`ray start` for this machine; it ends with the head, or by SIGTERM."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", head.address]
    words += ["--node-ip-address", ip, "--disable-usage-stats", "--min-worker-port", "0", "--max-worker-port", "0"]
    words += ["--include-log-monitor", "false"]
    for name, value in (("--num-cpus", cpus), ("--num-gpus", gpus)):
        words += [] if value is None else [name, str(value)]
    return [*words, "--resources", json.dumps(dict(custom))] if custom else words


def custom_resources(words: Iterable[str]) -> dict[str, float]:
    """`["h100=8"]` -> `{"h100": 8.0}`.

    Raises:
        ClusterError: something else.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, amount = word.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < math.inf:
            raise ClusterError(f"got {word}, expected NAME=N with a number above 0, such as h100=8")
    return found


def environment(head: Head, home: Path, given: Mapping[str, str], *, drain_s: float) -> dict[str, str]:
    """Of Ray on this machine and of the workers on it. `home` is where this machine sees the shared folder."""
    return (
        without_foreign(given)
        | mode(head.ip)
        | {
            "MANTA_HOME": str(home),
            "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            **{name: value for name, value in of_head(head).items() if name.startswith("RAY_SERVE_")},
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": f"{drain_s:g}",
            "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_worker_niceness": "0",
        }
    )


def join(
    home: Path,
    *,
    cpus: int | None,
    gpus: int | None,
    wait_s: float,
    drain_s: float,
    custom: Mapping[str, float] | None = None,
) -> None:
    """Becomes Ray's node on this machine: this process is replaced, and signals reach Ray itself.

    Args:
        home: the shared folder.
        cpus: that jobs may use here; default: all.
        gpus: the same.
        wait_s: for a head that is still to come.
        drain_s: from SIGTERM until the node goes; workers write a checkpoint after each step meanwhile.
        custom: resources by other names, for jobs that ask for them.

    Raises:
        ClusterError: no head to join came in time.
    """
    home = home.absolute()
    deadline = time.monotonic() + wait_s
    while True:
        try:
            head = head_of(home)
            words = command(head, own_address(head), cpus=cpus, gpus=gpus, custom=custom)
            break
        except ClusterError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)
    os.execvpe(words[0], words, environment(head, home, os.environ, drain_s=drain_s))
