"""Machines that join a head: what they need, what is said when it is missing, and one that comes and goes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.scripts.scripts import start as ray_start

from cluster import embedded, nodes
from cluster.doctor import examine
from cluster.embedded import ClusterError, Head
from tests.cluster.test_embedded import head_of, store


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def shared(home: Path, port: int = 1, ip: str = "10.0.0.5") -> Head:
    """A home with a head of another machine, which here is reached on loopback."""
    head = head_of(home, ip=ip, address=f"127.0.0.1:{port}")
    store(head)
    (home / "token").write_text("x" * 64)
    return head


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="manta up --nodes-at IP"):
        nodes.head_of(tmp_path)
    (tmp_path / "head.json").write_text("{")
    with pytest.raises(ClusterError, match="cannot be read"):
        nodes.head_of(tmp_path)
    shared(tmp_path, ip=embedded.LOOPBACK)
    with pytest.raises(ClusterError, match="on loopback"):
        nodes.head_of(tmp_path)
    (tmp_path / "token").unlink()
    store(head_of(tmp_path, ip="10.0.0.5"))
    with pytest.raises(ClusterError, match="as the user who started the head"):
        nodes.head_of(tmp_path)


def test_a_head_that_does_not_answer_is_waited_for(tmp_path: Path) -> None:
    shared(tmp_path)
    began = time.monotonic()
    with pytest.raises(ClusterError, match="firewall"):
        nodes.join(tmp_path, cpus=None, gpus=None, wait_s=0.6, drain_s=1)
    assert time.monotonic() - began > 0.6


def test_a_node_becomes_rays_own_process(tmp_path: Path, listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shared(tmp_path, listener)
    monkeypatch.setenv("GITHUB_TOKEN", "mine")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the bucket")
    became: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda _, words, environment: became.append((words, environment)))
    nodes.join(tmp_path, cpus=4, gpus=0, wait_s=0, drain_s=90, custom={"h100": 8})
    ((words, environment),) = became
    assert words[words.index("--address") + 1] == f"127.0.0.1:{listener}"
    assert words[words.index("--node-ip-address") + 1] == "127.0.0.1"  # this end of the way there
    assert words[words.index("--num-cpus") + 1] == "4" and words[words.index("--num-gpus") + 1] == "0"
    assert json.loads(words[words.index("--resources") + 1]) == {"h100": 8}
    assert environment["MANTA_HOME"] == str(tmp_path)
    assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "90"
    assert "GITHUB_TOKEN" not in environment and environment["AWS_ACCESS_KEY_ID"] == "of the bucket"


@pytest.mark.parametrize("word", ["h100", "h100=", "=8", "h100=many", "h100=0", "h100=-1", "h100=inf", "h100=nan"])
def test_a_resource_is_a_name_and_an_amount(word: str) -> None:
    assert nodes.custom_resources(["h100=8", "rack=0.5"]) == {"h100": 8.0, "rack": 0.5}
    with pytest.raises(ClusterError, match=f"got {word}, expected NAME=N"):
        nodes.custom_resources(["rack=1", word])


def test_the_options_exist_in_ray(tmp_path: Path) -> None:
    known = {option for parameter in ray_start.params for option in parameter.opts}
    words = nodes.command(head_of(tmp_path), "10.0.0.6", cpus=1, gpus=1, custom={"a": 1})
    assert {word for word in words if word.startswith("--")} <= known
    assert "--num-cpus" not in nodes.command(head_of(tmp_path), "10.0.0.6", cpus=None, gpus=None)


def test_a_head_for_others_is_in_another_mode(tmp_path: Path) -> None:
    """Alone: confined to loopback, and no watcher of notices that cannot come."""
    alone, several = (embedded.environment(head_of(tmp_path, ip=ip)) for ip in (embedded.LOOPBACK, "10.0.0.5"))
    assert alone["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and alone["GLOO_SOCKET_IFNAME"] == "lo"
    assert several["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1" and "GLOO_SOCKET_IFNAME" not in several
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in several


def test_the_doctor_asks_for_a_firewall(tmp_path: Path) -> None:
    shared(tmp_path)
    sockets = next(finding for finding in examine(tmp_path) if finding.name == "sockets")
    assert sockets.ok and "firewall" in sockets.detail


def own_ip() -> str:
    """An address of this machine that is not loopback; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


JOINS = """
import json, sys, time
from pathlib import Path
from cluster import embedded
home = Path(sys.argv[1])
embedded.start(home, ip=sys.argv[2], num_cpus=2)
embedded.connect(home)
import ray
deadline = time.monotonic() + 60
while time.monotonic() < deadline and ray.cluster_resources().get("CPU", 0) < 5:
    time.sleep(0.2)
print(json.dumps([ray.cluster_resources().get("CPU"), len([n for n in ray.nodes() if n["Alive"]])]))
"""


@pytest.mark.ray
def test_a_node_joins_and_leaves(tmp_path_factory: pytest.TempPathFactory) -> None:
    """It is started first, and waits for the head."""
    home = tmp_path_factory.mktemp("cluster")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MANTA_"))}
    add_node = [sys.executable, "-m", "service.cli", "--home", str(home), "cluster", "add-node"]
    add_node += ["--cpus", "3", "--gpus", "0", "--drain", "1"]
    node = subprocess.Popen(add_node, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        seen = subprocess.run(
            [sys.executable, "-c", JOINS, str(home), own_ip()], env=clean, capture_output=True, text=True, timeout=240
        )
        assert seen.stdout.strip() == "[5.0, 2]", seen.stdout + seen.stderr
        head = embedded.read(home)
        assert head is not None
        node.send_signal(signal.SIGTERM)
        assert node.wait(timeout=40) in (0, 1)  # 1 is what `ray start --block` makes of a SIGTERM
        assert head.alive(), "the head stays"
    finally:
        node.kill()
        node.communicate()
        if (head := embedded.read(home)) is not None:
            embedded.stop(head)
