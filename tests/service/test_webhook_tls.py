"""Deliveries over real TLS: to the address that was looked at, by the certificate of the name."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from service.deliverer import Deliverer
from service.principal import LOCAL
from service.settings import Settings
from service.store import Job, Store
from service.webhooks import Webhooks

HOST = "hooks.internal"  # no resolver has it


async def here(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    """Says nothing of handshakes that fail."""

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    made = trustme.CA()
    file = tmp_path_factory.mktemp("authority") / "ca.pem"
    made.cert_pem.write_to_path(file)
    return made, file


@pytest.fixture(params=[HOST])
def receiver(request: pytest.FixtureRequest, authority: tuple[trustme.CA, Path]) -> Iterator[Quiet]:
    """A server whose certificate has the name that the test asks for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority[0].issue_cert(request.param).configure_cert(context)
    server = Quiet(("127.0.0.1", 0), Receiver)
    server.got = []  # type: ignore[attr-defined]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def delivery(home: Path, port: int) -> Any:
    """What comes of telling `https://HOST:port/x` of a job."""
    settings = Settings(home=home, webhook_hosts=(HOST,))
    store = Store(settings.database)
    hooks = Webhooks(settings, store, find=here)
    hook = hooks.create(LOCAL, "default", f"https://{HOST}:{port}/x", ["QUEUED"])
    with store.session() as session:
        job = Job(id="job-1", name="n", spec={}, origin="rest", project="default")
        job.become("QUEUED", "accepted")
        session.add(job)
    Deliverer(settings, store, find=here).round()
    (found,) = hooks.deliveries(hook.id, limit=1)
    store.close()
    return found


def test_a_companys_own_authority_counts(
    receiver: Quiet, authority: tuple[trustme.CA, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority[1]))
    assert delivery(tmp_path, receiver.server_port)["state"] == "DELIVERED"
    assert receiver.got == [("/x", f"{HOST}:{receiver.server_port}")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("receiver", ["other.internal", "127.0.0.1"], indirect=True)
def test_the_certificate_of_another_name_does_not(
    receiver: Quiet, authority: tuple[trustme.CA, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority[1]))
    told = delivery(tmp_path, receiver.server_port)
    assert told["state"] == "PENDING" and "certificate is not valid for" in told["error"]
    assert receiver.got == []  # type: ignore[attr-defined]


def test_nor_does_an_authority_that_nobody_named(receiver: Quiet, tmp_path: Path) -> None:
    told = delivery(tmp_path, receiver.server_port)
    assert told["state"] == "PENDING" and "CERTIFICATE_VERIFY_FAILED" in told["error"]
    assert receiver.got == []  # type: ignore[attr-defined]
