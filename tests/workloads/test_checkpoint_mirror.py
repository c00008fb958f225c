"""The mirror brings a run to a node with an empty disk, and its absence costs nothing."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from workloads import checkpoint
from workloads import checkpoint_folder as files
from workloads.checkpoint import CheckpointError, Checkpoints
from workloads.checkpoint_mirror import Mirror
from workloads.ranks import Ranks
from workloads.spec_training import CheckpointPolicy


class Wire:
    """A connection to the S3 server that can be cut."""

    def __init__(self, port: int) -> None:
        self.cut, self.refused = False, 0
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.cut:
                self.refused += 1
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._port))
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with source, contextlib.suppress(OSError):  # which is what a cut looks like
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def disconnect(self) -> None:
        self.cut = True
        for end in self._open:
            with contextlib.suppress(OSError):  # it is closed already
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.disconnect()


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server did not start"
                time.sleep(0.1)
        wire = Wire(port)
        yield wire
        wire.close()
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(wire: Wire, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    from pyarrow import fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": wire.url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    wire.cut = False
    name = f"b{abs(hash(request.node.name))}"
    store = fs.S3FileSystem(endpoint_override=wire.url, scheme="http", region="us-east-1", allow_bucket_creation=True)
    store.create_dir(name)
    return f"s3://{name}"


@pytest.fixture
def frail(bucket: str, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same bucket by a client that gives up at once: pyarrow's own asks for six seconds each time."""
    from pyarrow import fs

    once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
    store = fs.S3FileSystem(endpoint_override=wire.url, scheme="http", region="us-east-1", retry_strategy=once)
    monkeypatch.setattr(Mirror, "_store", fs.SubTreeFileSystem(bucket.removeprefix("s3://"), store))
    return bucket


@pytest.fixture(params=["folder", "s3"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url: str = (
        request.getfixturevalue("bucket") + "/runs/a" if request.param == "s3" else str(tmp_path / "mirror" / "a")
    )
    return url


def made(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def checkpoints(folder: Path, mirror: str, delays_s: tuple[float, ...] = (), **policy: Any) -> Checkpoints:
    return Checkpoints(folder, CheckpointPolicy(mirror=mirror, **policy), Ranks(), mirror_delays_s=delays_s)


def save(writer: Checkpoints, step: int, metric: float | None = None) -> None:
    writer.save(step, *made(step), extra={"n": step}, metric=metric)


def listed(url: str) -> list[str]:
    from pyarrow import fs

    store, path = fs.FileSystem.from_uri(url) if "://" in url else (fs.LocalFileSystem(), url)
    return sorted(info.base_name for info in store.get_file_info(fs.FileSelector(path)))


def both(*steps: int) -> list[str]:
    return ["latest", *(f"step-{step:08d}.{kind}" for step in steps for kind in ("json", "pt"))]


def test_a_node_with_an_empty_disk_continues(mirror: str, tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "a", mirror).restore(*made()).step == 0
    with checkpoints(tmp_path / "a", mirror, keep=1, keep_best=1) as writer:
        for step, metric in ((1, 0.5), (2, 0.1), (3, 0.2), (4, 0.3)):
            save(writer, step, metric)
    assert listed(mirror) == both(2, 4)
    model, optimizer = made(9)
    with checkpoints(tmp_path / "b", mirror, keep=1, keep_best=1) as other:
        assert other.restore(model, optimizer) == checkpoint.Restored(4, {"n": 4}, [])
        assert torch.equal(model.weight, made(4)[0].weight)
        assert checkpoint.latest_step(tmp_path / "b") == 4
        save(other, 5, 0.9)
    assert listed(mirror) == both(2, 5), "the best one is elsewhere, and stays"
    assert checkpoints(tmp_path / "a", mirror).restore(*made()).step == 5, "newer than what is on the disk"


def test_the_mirror_heals_the_disk(mirror: str, tmp_path: Path) -> None:
    with checkpoints(tmp_path / "a", mirror) as writer:
        save(writer, 1)
        save(writer, 2)
    (tmp_path / "a" / "step-00000002.pt").write_bytes(b"")
    restored = checkpoints(tmp_path / "a", mirror).restore(*made())
    assert restored.step == 2 and restored.notes[0].endswith(f"continued from step 2 in {mirror}")
    assert checkpoint.restore_weights(tmp_path / "a", made()[0]) == 2


def test_folders_of_parts_go_there_and_back(mirror: str, tmp_path: Path) -> None:
    here, there, policy = tmp_path / "a", tmp_path / "b", CheckpointPolicy(keep=1)
    copy = Mirror(mirror, policy, wait=lambda _: True, delays_s=())
    for step in (1, 2):
        parts = [here / files.stem(step) / name for name in (".metadata", "__0_0.distcp")]
        parts[0].parent.mkdir(parents=True)
        for part in parts:
            part.write_bytes(part.name.encode() * step)
        sums = {f"{files.stem(step)}/{part.name}": files.sum_of(part) for part in parts}
        files.complete(here, files.Seal(step=step, files=sums, metric=None, time=0))
        assert copy.update(here)
    assert copy.steps() == [2]
    assert files.damage(there, copy.fetch(2, there)) is None
    assert files.latest_step(there) == 2


def test_a_store_that_is_away_is_asked_again(frail: str, wire: Wire, tmp_path: Path) -> None:
    pauses: list[float] = []

    def wait(delay_s: float) -> bool:
        pauses.append(delay_s)
        wire.cut = len(pauses) < 2
        return False

    with Checkpoints(tmp_path, CheckpointPolicy(), Ranks()) as writer:
        save(writer, 3)
    wire.disconnect()
    assert Mirror(frail, CheckpointPolicy(), wait=wait, delays_s=(1, 2, 4)).update(tmp_path)
    assert pauses == [1, 2] and wire.refused >= 2
    assert listed(frail) == both(3)


def test_a_store_that_stays_away_costs_no_checkpoint_and_is_brought_up_to_date(
    frail: str, wire: Wire, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with checkpoints(tmp_path / "a", frail, delays_s=(0.01,)) as writer:
        save(writer, 1)
        writer.wait()
        wire.disconnect()
        save(writer, 2)
        writer.wait()
        assert checkpoint.latest_step(tmp_path / "a") == 2
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert "step 2 is on the disk of the run but not yet in" in warning.getMessage()
        wire.cut = False
        assert listed(frail) == both(1)
        save(writer, 3)
    assert listed(frail) == both(2, 3)


def test_training_does_not_wait_for_a_store_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def away(*_: object) -> None:
        asked.set()
        raise OSError("connection refused")

    monkeypatch.setattr(Mirror, "_update", away)
    writer = checkpoints(tmp_path / "a", str(tmp_path / "mirror"), delays_s=(3600,))
    save(writer, 1)
    assert asked.wait(10)
    save(writer, 2)  # ends the hour of waiting
    writer._wait_for_write()
    assert checkpoint.latest_step(tmp_path / "a") == 2
    writer._next_waits.set()
    writer.close()


def test_a_mirror_that_cannot_be_read_is_no_fresh_start(frail: str, wire: Wire, tmp_path: Path) -> None:
    wire.disconnect()
    with pytest.raises(CheckpointError, match=f"{frail} cannot be read") as caught:
        checkpoints(tmp_path / "a", frail).restore(*made())
    assert "see that s3://" in caught.value.hint
    with Checkpoints(tmp_path / "a", CheckpointPolicy(), Ranks()) as writer:
        save(writer, 1)
    restored = checkpoints(tmp_path / "a", frail).restore(*made())
    assert restored.step == 1 and "cannot be read" in restored.notes[0]


def test_a_mirror_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere://x cannot be read"):
        checkpoints(tmp_path, "nowhere://x").restore(*made())


def test_a_large_one_goes_there_and_back(bucket: str, tmp_path: Path) -> None:
    with checkpoints(tmp_path / "a", bucket) as writer:
        writer.save(1, *made(), extra={"much": torch.arange(2 << 20)}, metric=None)  # 16 MiB: sent in pieces
    assert checkpoints(tmp_path / "b", bucket).restore(*made()).extra["much"][-1] == (2 << 20) - 1


def test_a_write_that_failed_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with (
        pytest.raises(CheckpointError, match="No space left"),
        checkpoints(tmp_path / "a", str(tmp_path / "m")) as writer,
    ):
        save(writer, 1)
    assert writer._mirrored is not None and writer._mirrored.result()
    assert not (tmp_path / "m").exists()
