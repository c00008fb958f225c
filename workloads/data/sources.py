"""Where the bytes of shards are: a local disk, an object store, a web server; read in pieces, retried when they fail.

Local files are read by the system's own calls, `s3://`, `gs://` and `hdfs://` through pyarrow, everything
else that fsspec knows (`https://`, `abfs://`, ...) through fsspec. Credentials and endpoints come from the
environment variables that those libraries read (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import lru_cache
from typing import Any, Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_DELAYS_S = (0.25, 0.5, 1, 2, 4, 8, 16)  # a store that is away for half a minute costs nobody a job
CONNECT_S, SILENCE_S = 5, 10  # until a request has failed
CONNECTIONS = 32  # requests at a time to a remote store


class Unreachable(OSError):
    """A store that gave no usable answer, asked several times: it may give one later."""


class Unsupported(OSError):
    """A URL that nothing installed here can read."""


FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, Unsupported)
_PASSING = (408, 425, 429)  # of the answers 4xx of a web server
_FINAL_WORDS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH")
_PYARROW = ("s3", "gs", "gcs", "hdfs")
NEAR_BYTES, FAR_BYTES = 8 << 20, 8 << 10  # read ahead while headers are near each other, or far apart

_ends = ContextVar("_ends", default=math.inf)  # when `retried` gives up, whatever its delays; of time.monotonic()


class Shard(Protocol):
    """An open shard; `read_at` may be called from several threads."""

    size: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end of the file."""

    def close(self) -> None: ...


def is_remote(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


@contextmanager
def hurried(patience_s: float) -> Iterator[None]:
    """In the block, nothing is asked again later than so many seconds from now: somebody waits for the answer."""
    token = _ends.set(time.monotonic() + patience_s)
    try:
        yield
    finally:
        _ends.reset(token)


def retried(what: str, call: Callable[[], T], delays_s: Sequence[float] = RETRY_DELAYS_S) -> T:
    """The answer of `call`, asked again with growing pauses while it raises OSError that may pass.

    Raises:
        Unreachable: there was no other answer, however often it was asked.
        OSError: one that asking again would not change.
    """
    started = time.monotonic()
    for delay_s in (*delays_s, None):
        try:
            return call()
        except FINAL:
            raise
        except OSError as error:
            if any(word in str(error) for word in _FINAL_WORDS):
                raise
            said, now = " ".join(str(error).split()), time.monotonic()
            if delay_s is None or now + delay_s > _ends.get():
                raise Unreachable(f"{what} failed for {now - started:.0f} s: {said}") from error
            logger.warning("%s failed (%s); again in %s s", what, said, delay_s)
            time.sleep(delay_s)
    raise AssertionError


def open_shard(path: str) -> Shard:
    """Opens a shard for ranged reads.

    Raises:
        OSError: it is not there, or cannot be read after several tries.
    """
    return _remote(path) if is_remote(path) else _Local(path)


@lru_cache(maxsize=4096)
def _remote(path: str) -> Shard:
    """Kept: each opening is a request, and a batch touches many shards."""
    kind = _Arrow if path.split("://")[0] in _PYARROW else _FSSpec
    return retried(f"opening {path}", lambda: kind(path))


def sizes(paths: Sequence[str]) -> list[int]:
    """Bytes of each shard; remote ones are asked at the same time.

    Raises:
        OSError: one is not there.
    """

    def size(path: str) -> int:
        shard = open_shard(path)
        try:
            return shard.size
        finally:
            shard.close()

    if not any(map(is_remote, paths)):
        return [os.stat(path).st_size for path in paths]  # noqa: PTH116
    with ThreadPoolExecutor(CONNECTIONS, initializer=_ends.set, initargs=(_ends.get(),)) as pool:
        return list(pool.map(size, paths))


def list_folder(folder: str) -> list[str]:
    """URLs of the files directly in a remote folder, sorted.

    Raises:
        OSError: it cannot be listed.
    """
    scheme = folder.split("://")[0]
    if scheme in _PYARROW:
        from pyarrow import fs

        def infos() -> list[Any]:
            store, path = _arrow(folder)
            found: list[Any] = store.get_file_info(fs.FileSelector(path))
            return found

        found = retried(f"listing {folder}", infos)
        return sorted(f"{scheme}://{info.path}" for info in found if info.is_file)
    store = _fsspec(scheme)
    listed: list[str] = retried(f"listing {folder}", lambda: _as_os_error(lambda: store.ls(folder, detail=False)))
    return sorted(listed)


def read_file(path: str) -> bytes | None:
    """A small file next to remote shards as a whole, None where there is none."""
    try:
        shard = open_shard(path)
    except FileNotFoundError:
        return None
    try:
        return shard.read_at(0, shard.size)
    finally:
        shard.close()


def write_file(path: str, data: bytes) -> None:
    """Writes a file into a remote folder, whole or not at all.

    Raises:
        OSError: the store does not take it.
    """
    scheme = path.split("://")[0]
    if scheme in _PYARROW:
        store, name = _arrow(path)
        with store.open_output_stream(name) as stream:
            stream.write(data)
    elif scheme in ("http", "https"):
        raise PermissionError(f"{path}: a web server takes no files")
    else:
        _fsspec(scheme).pipe_file(path, data)


class _Local:
    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        whole = os.pread(self._file, size, offset)
        if len(whole) == size:
            return whole
        pieces = [whole]
        offset, size = offset + len(whole), size - len(whole)
        while size and (piece := os.pread(self._file, size, offset)):
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        os.close(self._file)


@lru_cache(maxsize=64)
def _arrow_store(root: str) -> Any:
    from pyarrow import fs

    try:
        store = fs.FileSystem.from_uri(root)[0]
    except ValueError as error:
        raise Unsupported(f"{root}: {error}") from error
    except OSError as error:
        if "libjvm" in str(error) or "libhdfs" in str(error):  # hundreds of lines, of each place where it is not
            raise Unsupported(f"{root}: hdfs:// needs Java and Hadoop's libhdfs") from error
        raise
    return impatient(store)


def impatient(store: Any) -> Any:
    """A file system that pyarrow made of a URL, with few retries of its own: asking again is for who uses it.

    As it is made, it asks a server that is silent for 100 s (S3) or 15 min (GCS).
    """
    if store.type_name not in ("s3", "gcs"):
        return store
    _, (options,) = store.__reduce__()  # the arguments of its constructor, whose defaults are others
    if store.type_name == "gcs":
        options["retry_time_limit"] = timedelta(seconds=CONNECT_S)
    return type(store)(**options)


def _arrow(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    scheme, rest = url.split("://", 1)
    bucket = rest.split("/", 1)[0]
    return _arrow_store(f"{scheme}://{bucket}/"), rest if scheme != "hdfs" else "/" + rest.split("/", 1)[1]


class _Arrow:
    def __init__(self, url: str) -> None:
        store, path = _arrow(url)
        self._url = url
        self._file = store.open_input_file(path)  # not a stream: its default reads 40 times slower
        self.size: int = self._file.size()

    def read_at(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        data: bytes = retried(f"reading {self._url}", lambda: self._file.read_at(size, offset))
        return data

    def close(self) -> None:
        """Stays open for the next batch."""


@lru_cache(maxsize=16)
def _fsspec(scheme: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=SILENCE_S)}
    try:
        return fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:  # no driver, or no such scheme
        raise Unsupported(f"{scheme}://: {error}") from error


class _FSSpec:
    def __init__(self, url: str) -> None:
        self._url, self._store = url, _fsspec(url.split("://")[0])
        size = _as_os_error(lambda: self._store.info(url))["size"]
        if size is None:
            raise PermissionError(f"{url}: the server does not tell its size, so it cannot be read in pieces")
        self.size: int = size

    def read_at(self, offset: int, size: int) -> bytes:
        stop = min(offset + size, self.size)

        def read() -> bytes:
            data: bytes = _as_os_error(lambda: self._store.cat_file(self._url, start=offset, end=stop))
            return data

        data = retried(f"reading {self._url}", read)
        if len(data) != stop - offset:
            raise PermissionError(f"{self._url}: got {len(data)} of {stop - offset} bytes; the server gives no ranges")
        return data

    def close(self) -> None:
        """Nothing is kept open: each read is a request."""


def _as_os_error(call: Callable[[], T]) -> T:
    """Fsspec passes on what its HTTP client raises, and calls a file missing whatever a server answers, or if none."""
    try:
        return call()
    except Exception as error:
        cause = error.__cause__ or error if isinstance(error, FileNotFoundError) else error
        status = getattr(cause, "status", None)
        if (cause is error and isinstance(error, OSError)) or status in (404, 410):
            raise
        text = f"{type(cause).__name__}: {cause}"
        if status is not None and 400 <= status < 500 and status not in _PASSING:
            raise PermissionError(text) from error
        raise OSError(text) from error


class ScanFile(io.RawIOBase):
    """A remote shard as a file whose headers are read one after the other.

    Reads ahead: much while members are small, so that one request brings many headers, little where they are large,
    so that their contents are jumped over.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._position = self._start = 0
        self._buffer = b""

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        at = self._position - self._start
        if not 0 <= at <= at + size <= len(self._buffer):
            far = at > NEAR_BYTES + len(self._buffer)
            self._start, at = self._position, 0
            self._buffer = self._shard.read_at(self._start, max(size, FAR_BYTES if far else NEAR_BYTES))
        data = self._buffer[at : at + size]
        self._position += len(data)
        return data

    def close(self) -> None:
        self._shard.close()
        super().close()


def open_scan(path: str) -> tuple[AbstractContextManager[Any], int]:
    """A shard as a file for the header scan, and its size.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    if not is_remote(path):
        return open(path, "rb"), os.stat(path).st_size  # noqa: PTH116
    shard = open_shard(path)
    return ScanFile(shard), shard.size
