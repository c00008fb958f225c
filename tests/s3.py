"""An S3 server on loopback that can go away and come back with all that it held."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workloads.spec import JobSpec

START_TIMEOUT_S = 30.0
REQUEST = re.compile(rb"((?:GET|HEAD|PUT|POST|DELETE) \S+) HTTP/1")


class S3:
    """The way to a server, which can be closed: connections break, and new ones are refused.

    Attributes:
        refused: connections, while it was closed.
        requests: what came through, such as "GET /bucket/key".
    """

    def __init__(self, server_port: int) -> None:
        self.refused = 0
        self.requests: list[str] = []
        self._server_port, self._ends, self._away = server_port, list[socket.socket](), False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that uses it."""
        own = {"AWS_ENDPOINT_URL": self.url, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        return own | {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

    def store(self, **options: Any) -> Any:
        """A client; `options` are those of `pyarrow.fs.S3FileSystem`."""
        from pyarrow import fs

        return fs.S3FileSystem(
            endpoint_override=self.url,
            scheme="http",
            region="us-east-1",
            access_key="test",
            secret_key="test",
            allow_bucket_creation=True,
            **options,
        )

    def bucket(self, files: Iterable[Path] = ()) -> str:
        """The name of a new bucket that holds these files."""
        name, store = f"bucket-{uuid.uuid4().hex}", self.store()
        store.create_dir(name)
        for file in files:
            with store.open_output_stream(f"{name}/{file.name}") as stream:
                stream.write(file.read_bytes())
        return name

    def leave(self) -> None:
        self._away = True
        for end in self._ends:
            with contextlib.suppress(OSError):  # the other side has closed it
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def come_back(self) -> None:
        self._away = False

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.leave()
        yield
        self.come_back()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._away:
                self.refused += 1
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._server_port))
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with source, contextlib.suppress(OSError):  # which is what being away looks like
            while data := source.recv(1 << 16):
                if begun := REQUEST.match(data):  # a client sends the next one when it has read the answer to the last
                    self.requests.append(begun[1].decode())
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()
        self.leave()


@contextlib.contextmanager
def served() -> Iterator[S3]:
    """Moto's server, which takes 2 s to start."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1).close()
                break
            assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)
        s3 = S3(port)
        yield s3
        s3.close()
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """Who closes the way to it opens it again."""
    with served() as s3:
        yield s3


def on_s3(spec: JobSpec, s3: S3) -> JobSpec:
    """The job with its shards and a mirror of its checkpoints in a new bucket."""
    pattern = spec.data["train"].shards
    assert isinstance(pattern, str)
    folder = Path(pattern).parent
    bucket = s3.bucket([*folder.glob("train-*.tar"), folder / "classes.txt"])
    return JobSpec.model_validate(
        spec.model_dump()
        | {"data": {"train": {"shards": f"s3://{bucket}/{Path(pattern).name}"}}}
        | {"checkpoint": spec.checkpoint.model_dump() | {"mirror": f"s3://{bucket}/checkpoints"}}
    )
