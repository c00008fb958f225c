"""What a receiver may do to the one who sends: redirect, move to a private address, never answer, never stop."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

import service.webhook_sender
from service.deliverer import LEASE_S, Deliverer
from service.principal import LOCAL
from service.webhooks import Webhooks
from tests.service.receivers import Stage


def test_gone_is_for_good_and_redirects_are_not_followed(stage: Stage) -> None:
    hook = stage.hook()
    stage.job()
    stage.answers = ["307", "410"]
    stage.turn()
    (row,) = stage.hooks.deliveries(hook.id, limit=9)
    assert row["state"] == "PENDING" and row["error"] == "got 307, expected 2xx; redirects are not followed"
    stage.now += 10
    stage.turn()
    assert stage.row(hook).disabled_at == stage.now


def test_a_name_that_turns_private_is_not_asked(stage: Stage) -> None:
    hook = stage.hook()
    stage.job()

    async def rebound(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "169.254.169.254"]

    stage.services[0]._sender._find = rebound
    stage.turn()
    assert stage.got == [] and "all public" in str(stage.hooks.deliveries(hook.id, limit=1)[0]["error"])


def test_a_second_address_is_tried(stage: Stage) -> None:
    stage.hook()
    stage.job()

    async def two(host: str, port: int) -> list[str]:
        return ["2606:4700::1111", "93.184.216.34"]

    stage.services[0]._sender._find = two
    stage.answers = ["down", "200"]
    stage.turn()
    assert [request.url.host for request in stage.got] == ["93.184.216.34"]


def test_a_receiver_that_never_answers_is_left(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = stage.hook()
    stage.job()

    timeouts: list[dict[str, float | None]] = []

    async def never(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"])
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(service.webhook_sender, "DEADLINE_S", 0.01)
    stage.services[0]._sender._transport = httpx.MockTransport(never)
    stage.turn()
    assert stage.hooks.deliveries(hook.id, limit=1)[0]["error"] == "no answer in 0.01 s"
    assert [{*limits.values()} for limits in timeouts] == [{None}]  # nothing ends it sooner: httpx would after 5 s


def test_the_thread_stops_in_the_middle_of_a_request(stage: Stage) -> None:
    stage.hook()
    stage.job()
    reached = threading.Event()

    async def never(request: httpx.Request) -> httpx.Response:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    deliverer = stage.services[0]
    deliverer._sender._transport = httpx.MockTransport(never)
    deliverer.start()
    assert reached.wait(10)
    deliverer.stop()
    assert not deliverer._thread.is_alive()
    stage.now += LEASE_S + 1
    stage.services[1].round()
    assert len(stage.got) == 1


class Endless(BaseHTTPRequestHandler):
    """Accepts, and then talks until nobody listens."""

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


def test_over_a_real_socket_the_body_of_the_answer_is_not_read(stage: Stage) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.bodies = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        allowed = stage.settings.model_copy(update={"webhook_hosts": ("127.0.0.1",)})
        url = f"http://127.0.0.1:{server.server_port}/x"
        hook = Webhooks(allowed, stage.store, lambda: stage.now).create(LOCAL, "default", url, ["QUEUED"])
        stage.job()
        Deliverer(allowed, stage.store, lambda: stage.now).round()
        assert stage.hooks.deliveries(hook.id, limit=1)[0]["state"] == "DELIVERED"
        assert [json.loads(body)["type"] for body in server.bodies] == ["job.queued"]  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
