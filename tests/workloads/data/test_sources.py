import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.s3 import S3
from workloads.data import sources
from workloads.data.manifest import DataError, Manifest, open_manifest, peek
from workloads.data.reader import Reader
from workloads.data.sources import ScanFile, retried
from workloads.data.views import View

VIEWS = {"image": View(size=4)}


@pytest.fixture
def bucket(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """`bucket(folder)` uploads the files of a folder into a bucket of its own and returns its URL."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    sources._arrow_store.cache_clear()

    def upload(folder: Path) -> str:
        return f"s3://{s3_server.bucket(folder.iterdir())}"

    yield upload
    sources._arrow_store.cache_clear()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path, list[int]]]:
    """A web server that understands ranges: its address, its folder, and the answers that it gives before working."""
    folder, faults = tmp_path / "www", list[int]()
    folder.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            if faults:
                self.send_error(faults.pop())
                return
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            data, wanted = file.read_bytes(), self.headers.get("Range")
            self.send_response(206 if wanted else 200)
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                data = data[int(first) : int(last) + 1]
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, faults
    server.shutdown()
    thread.join()
    server.server_close()


def same_batches(remote: str, local: str) -> None:
    there, here = (Reader(open_manifest(pattern), VIEWS, batch_size=4) for pattern in (remote, local))
    for step in range(there.steps_per_epoch):
        a, b = there.batch(step), here.batch(step)
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_s3_gives_what_the_local_files_give(make_manifest, tmp_path, bucket):
    make_manifest([5, 0, 7])
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    shards = tmp_path / "up"
    shards.mkdir()
    for file in (*tmp_path.glob("*.tar"), tmp_path / "classes.txt"):
        (shards / file.name).write_bytes(file.read_bytes())
    url = bucket(shards)
    peek(f"{url}/set-*.tar")
    manifest = open_manifest(f"{url}/set-*.tar")
    assert manifest.classes == ["x", "y", "z"] and manifest.shards[0] == f"{url}/set-000000.tar"
    same_batches(f"{url}/set-{{000000..000002}}.tar", str(tmp_path / "set-*.tar"))


def test_s3_keeps_the_manifest_beside_the_shards(make_manifest, tmp_path, bucket, monkeypatch):
    make_manifest([3])
    shards = tmp_path / "up"
    shards.mkdir()
    (tmp_path / "set-000000.tar").rename(shards / "set-000000.tar")
    url = bucket(shards)
    first = open_manifest(f"{url}/set-000000.tar")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    monkeypatch.setattr("workloads.data.indexing.scan", None)  # a second scan would fail
    assert open_manifest(f"{url}/set-000000.tar").content_hash == first.content_hash


def test_s3_says_what_is_missing(bucket, tmp_path):
    (tmp_path / "up").mkdir()
    url = bucket(tmp_path / "up")
    with pytest.raises(DataError, match=f"{url}/no.tar"):
        peek(f"{url}/no.tar")
    with pytest.raises(DataError, match="no file that matches"):
        peek(f"{url}/*.tar")


def test_a_web_server_gives_what_the_local_files_give(make_manifest, tmp_path, web):
    make_manifest([5, 7])
    url, folder, _ = web
    for file in tmp_path.glob("*.tar"):
        (folder / file.name).write_bytes(file.read_bytes())
    same_batches(f"{url}/set-{{000000..000001}}.tar", str(tmp_path / "set-*.tar"))


def test_errors_that_pass_are_waited_out(make_manifest, tmp_path, web, monkeypatch):
    make_manifest([4])
    url, folder, faults = web
    (folder / "a.tar").write_bytes((tmp_path / "set-000000.tar").read_bytes())
    reader = Reader(open_manifest(f"{url}/a.tar"), VIEWS, batch_size=4)
    pauses: list[float] = []
    monkeypatch.setattr(sources.time, "sleep", pauses.append)
    faults += [503, 503, 500]
    assert sorted(reader.batch(0)["index"].tolist()) == [0, 1, 2, 3]
    assert pauses == [0.25, 0.5, 1]


def test_errors_that_stay_end_with_the_shard_and_offset(make_manifest, tmp_path, web, monkeypatch):
    make_manifest([4])
    url, folder, faults = web
    (folder / "a.tar").write_bytes((tmp_path / "set-000000.tar").read_bytes())
    reader = Reader(open_manifest(f"{url}/a.tar"), VIEWS, batch_size=4)
    monkeypatch.setattr(sources.time, "sleep", lambda _: None)
    shard = sources.open_shard(f"{url}/a.tar")
    faults += [503] * 50
    with pytest.raises(OSError, match="503"):
        shard.read_at(0, 10)
    faults[:] = [503] * 50
    with pytest.raises(DataError, match=r"503.*a.tar.* at offset 512"):
        reader.batch(0)


def test_a_missing_file_is_not_asked_for_again(monkeypatch):
    calls = []
    monkeypatch.setattr(sources.time, "sleep", lambda _: pytest.fail("waited"))

    def missing() -> None:
        calls.append(1)
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        retried("asking", missing)
    assert calls == [1]


class Counted:
    """A shard in memory that counts its reads."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.reads = data, len(data), list[int]()

    def read_at(self, offset: int, size: int) -> bytes:
        self.reads.append(size)
        return self.data[offset : offset + size]

    def close(self) -> None:
        pass


def test_headers_near_each_other_come_with_one_request_and_far_ones_are_jumped_to():
    near, far = Counted(bytes(range(256)) * 400), Counted(os.urandom(96 << 20))
    file = ScanFile(near)
    for offset in range(0, 100_000, 1024):
        file.seek(offset)
        assert file.read(512) == near.data[offset : offset + 512]
    assert len(near.reads) == 1
    file = ScanFile(far)
    for offset in range(0, 96 << 20, 24 << 20):
        file.seek(offset)
        assert file.read(512) == far.data[offset : offset + 512]
    assert sum(far.reads[1:]) == 3 * sources.FAR_BYTES


@pytest.mark.parametrize("stop", [0, 3, 9])
def test_rows_of_a_remote_shard_are_read_in_their_order(make_manifest, tmp_path, web, stop):
    from workloads.data.ranged import read_members

    make_manifest([10])
    url, folder, _ = web
    (folder / "a.tar").write_bytes((tmp_path / "set-000000.tar").read_bytes())
    rows = np.arange(10)[::-1][:stop]
    local, remote = open_manifest(str(tmp_path / "set-000000.tar")), open_manifest(f"{url}/a.tar")
    assert read_members(remote, "image", rows) == read_members(local, "image", rows)


def test_shards_uploaded_with_their_manifest_are_read(
    bucket: Callable[[Path], str], make_manifest: Callable[..., Manifest], tmp_path: Path
) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    make_manifest([3, 2])
    for shard in tmp_path.glob("set-*.tar"):
        shard.rename(folder / shard.name)
    local = open_manifest(f"{folder}/set-{{000000..000001}}.tar")
    url = bucket(folder)
    assert any(file.name.endswith(".manifest.parquet") for file in folder.iterdir())
    for _ in range(2):  # made anew, then found
        remote = open_manifest(f"{url}/set-{{000000..000001}}.tar")
        assert len(remote) == len(local) == 5 and all(shard.startswith("s3://") for shard in remote.shards)
        assert (remote.label == local.label).all()
