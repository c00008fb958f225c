"""An installation whose parts can be killed: Ray's head, the service in a process of its own, PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from cluster import embedded
from cluster.embedded import Head
from tests.faults.doomed import PID, ROOT
from tests.waiting import until

ANSWER_S = 120.0  # in which a client that tries again is answered
KILLED_S = 900.0  # in which the service is killed that was told to kill itself
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
            until(lambda: self._process.poll() is not None or self._answers(), "PostgreSQL answers or ends")
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
        path, deadline = self.home / PID, time.monotonic() + KILLED_S
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
        deadline = time.monotonic() + ANSWER_S
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
