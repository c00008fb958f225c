"""The embedded cluster: on loopback, with a token, alone, and ended completely."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from cluster import embedded
from cluster.doctor import examine, listening
from cluster.embedded import ClusterError, Head


def head_of(home: Path, **changes: object) -> Head:
    me = psutil.Process()
    fields = {
        "pid": me.pid,
        "created": me.create_time(),
        "home": home,
        "temp_dir": home / "t",
        "token_path": home / "token",
        "address": "127.0.0.1:1",
        "dashboard_url": "http://127.0.0.1:1",
        "http_port": 1,
        "metric_ports": (2, 3),
        "num_cpus": 2,
    }
    return Head.model_validate(fields | changes)


def store(head: Head) -> None:
    (head.home / "head.json").write_text(head.model_dump_json())


@pytest.fixture
def dashboard() -> Iterator[tuple[str, int]]:
    """A Jobs API that takes the token `right` only."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers["Authorization"] == "Bearer right" else 401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_head_that_is_gone_is_not_there(tmp_path: Path) -> None:
    assert embedded.read(tmp_path) is None
    store(head_of(tmp_path))
    assert embedded.read(tmp_path) is not None
    store(head_of(tmp_path, created=1.0))  # the pid is another process by now
    assert embedded.read(tmp_path) is None
    cluster = next(f for f in examine(tmp_path) if f.name == "cluster")
    assert not cluster.ok and "gone" in cluster.detail


def test_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "head.json").write_text("{")
    with pytest.raises(ClusterError, match="remove it and run `manta up`"):
        embedded.read(tmp_path)


@pytest.mark.parametrize(
    ("token", "message"), [("right", None), ("wrong", "started with another one"), (None, "token file .* is missing")]
)
def test_the_probe_tells_a_wrong_token(
    tmp_path: Path, dashboard: tuple[str, int], token: str | None, message: str | None
) -> None:
    url, port = dashboard
    head = head_of(tmp_path, address=f"127.0.0.1:{port}", dashboard_url=url)
    if token is not None:
        head.token_path.write_text(token)
    if message is None:
        embedded.probe(head)
        return
    with pytest.raises(ClusterError, match=message):
        embedded.probe(head)


def test_a_port_where_nobody_listens_is_told_at_once(tmp_path: Path) -> None:
    head = head_of(tmp_path)
    head.token_path.write_text("right")
    began = time.monotonic()
    with pytest.raises(ClusterError, match="does not answer"):
        embedded.probe(head)
    assert time.monotonic() - began < 5


def test_stop_spares_a_process_that_only_has_the_pid(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    head = head_of(tmp_path, pid=sleeper.pid, created=1.0)
    store(head)
    embedded.stop(head)
    assert sleeper.poll() is None and not (tmp_path / "head.json").exists()
    sleeper.kill()
    sleeper.wait()


def test_exports_are_one_environment(tmp_path: Path) -> None:
    head = head_of(tmp_path / "a 'home'")
    script = f'{embedded.shell_exports(head)}\nprintf "%s" "$MANTA_HOME|$RAY_AUTH_MODE|$RAY_ADDRESS"'
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed == f"{head.home}|token|{embedded.environment(head)['RAY_ADDRESS']}"


def test_doctor_finds_a_readable_token_and_a_shell_that_points_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = head_of(tmp_path)
    store(head)
    head.token_path.write_text("right")
    head.token_path.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = {finding.name: finding for finding in examine(tmp_path)}
    assert not found["token"].ok and "chmod 600" in found["token"].hint
    assert not found["environment"].ok and "RAY_AUTH_MODE=disabled, expected token" in found["environment"].detail
    assert not found["jobs api"].ok and not found["service"].ok


def test_doctor_lists_sockets_that_others_can_reach() -> None:
    script = (
        "import socket, time; a = socket.create_server(('0.0.0.0', 0)); b = socket.create_server(('127.0.0.1', 0));"
    )
    script += "print(a.getsockname()[1], flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    assert [found[1:] for found in listening(process.pid)] == [("0.0.0.0", port)]
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.ray
def test_every_socket_is_on_loopback(cluster: Head) -> None:
    assert listening(cluster.pid) == []
    leader = psutil.Process(cluster.pid)
    assert len(leader.children(recursive=True)) > 5  # it did look at a cluster
    assert cluster.token_path.stat().st_mode & 0o077 == 0
    assert len(str(cluster.temp_dir)) <= 40


@pytest.mark.ray
def test_a_second_start_in_the_same_home_is_refused(cluster: Head) -> None:
    with pytest.raises(ClusterError, match="runs already"):
        embedded.start(cluster.home)
    assert embedded.read(cluster.home) == cluster


@pytest.mark.ray
def test_two_clusters_do_not_meet_and_one_ends_alone(cluster: Head, tmp_path: Path) -> None:
    other = embedded.start(tmp_path / "other", num_cpus=1)
    family = [psutil.Process(other.pid), *psutil.Process(other.pid).children(recursive=True)]
    stranger = other.model_copy(update={"token_path": cluster.token_path})
    try:
        with pytest.raises(ClusterError, match="started with another one"):
            embedded.probe(stranger)
    finally:
        began = time.monotonic()
        embedded.stop(other)
        took = time.monotonic() - began
    assert took < 5
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert not other.temp_dir.exists() and embedded.read(other.home) is None
    embedded.probe(cluster)  # untouched


@pytest.mark.ray
def test_ctrl_c_while_starting_leaves_nothing(tmp_path: Path) -> None:
    # who runs the tests in the background ignores Ctrl-C, and so would this
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script += f"from cluster.embedded import start; from pathlib import Path; start(Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "head.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    head = Head.model_validate_json((tmp_path / "head.json").read_text())
    time.sleep(1.0)  # somewhere in the middle
    os.kill(process.pid, signal.SIGINT)
    try:
        assert process.wait(20) != 0
        assert not psutil.pid_exists(head.pid) and not (tmp_path / "head.json").exists()
    finally:
        embedded.stop(head)
