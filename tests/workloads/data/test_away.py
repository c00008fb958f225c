"""Data that cannot be read says so as a DataError, and no check waits long for a store that does not answer."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clock import Clock
from tests.toy import TOY_MAE, TOY_MODEL
from workloads.data import sources
from workloads.data.manifest import count, open_manifest, peek
from workloads.data.scores import expect_scores
from workloads.data.shards import DataError, Unreachable, expand, read_classes
from workloads.data.sources import RETRY_DELAYS_S, hurried, retried, sizes
from workloads.preflight import PATIENCE_S, NoAnswer, check
from workloads.spec import JobSpec


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sources, "time", clock)
    return clock


@pytest.fixture
def closed() -> str:
    """The address of a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def refusing() -> Iterator[tuple[str, list[int]]]:
    """The address of a server that answers 403 to everything, and its answers."""
    answers: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            answers.append(403)
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815 as the server calls it

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", answers
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`endpoint(address)`: S3 is there."""

    def at(address: str) -> None:
        for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_REGION", "x")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        sources._arrow_store.cache_clear()

    yield at
    sources._arrow_store.cache_clear()


READS: list[Callable[[str], object]] = [
    peek,
    count,
    open_manifest,
    expect_scores,
    read_classes,
    lambda url: expand(f"{url}*"),
]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("url", "words"), [("abfs://c/x/a.tar", "Install adlfs"), ("nowhere://c/x/a.tar", "Protocol not known: nowhere")]
)
def test_what_nothing_installed_here_can_read(read: Callable[[str], object], url: str, words: str) -> None:
    with pytest.raises(DataError, match=f"which cannot be read .*{words}.*expected.*; install what it takes"):
        read(url)


@pytest.mark.parametrize("read", READS)
def test_s3_that_refuses(
    read: Callable[[str], object], refusing: tuple[str, list[int]], endpoint: Callable[[str], None], clock: Clock
) -> None:
    endpoint(refusing[0])
    with pytest.raises(DataError, match=r"ACCESS_DENIED.*; check the path, and who may read and list it") as refused:
        read("s3://bucket/x/a.tar")
    assert not isinstance(refused.value, Unreachable) and clock.now == 0


def test_a_web_server_that_refuses_is_not_asked_again(refusing: tuple[str, list[int]], clock: Clock) -> None:
    with pytest.raises(DataError, match=r"403.*who may read"):
        peek(f"http://{refusing[0]}/x/a.tar")
    assert clock.now == 0


@pytest.mark.parametrize("read", READS)
def test_a_store_that_is_away(read: Callable[[str], object], closed: str, clock: Clock) -> None:
    with hurried(2), pytest.raises(Unreachable, match=f"got no answer for .*{closed}.*; try again"):
        read(f"http://{closed}/x/a.tar")
    assert clock.now == 0.25 + 0.5 + 1


def test_s3_that_is_away(closed: str, endpoint: Callable[[str], None], clock: Clock) -> None:
    endpoint(closed)
    with hurried(0), pytest.raises(Unreachable, match="NETWORK_CONNECTION"):
        peek("s3://bucket/x/a.tar")


def test_several_shards_are_asked_for_in_no_longer_a_time(closed: str, clock: Clock) -> None:
    with hurried(0), pytest.raises(sources.Unreachable):
        sizes([f"http://{closed}/{i}.tar" for i in range(3)])
    assert clock.now == 0


def test_without_a_hurry_all_pauses_are_made(clock: Clock) -> None:
    def call() -> None:
        raise OSError("503 Slow Down")

    with pytest.raises(sources.Unreachable, match=r"^asking failed for 32 s: 503 Slow Down$"):
        retried("asking", call)
    assert clock.now == sum(RETRY_DELAYS_S)


def test_the_check_before_a_job_is_accepted_gives_up_in_seconds(closed: str, clock: Clock, tmp_path: Path) -> None:
    spec = {"name": "n", "method": TOY_MAE, "model": TOY_MODEL, "epochs": 1}
    data = {"train": {"shards": f"http://{closed}/x/a.tar"}}
    with pytest.raises(NoAnswer, match="got no answer for"):
        check(JobSpec.model_validate(spec | {"data": data}), tmp_path)
    assert 1 < clock.now < PATIENCE_S
