"""The health check of the image: where it looks, and what it makes of the answer."""

from __future__ import annotations

import http.server
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import health
from cluster.embedded import Head
from tests.clock import Clock
from tests.helm.chart import CHART, one, render


@pytest.fixture
def answering() -> Iterator[int]:
    """A server on loopback: 200 for /readyz, 503 elsewhere."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/readyz" else 503)
            self.end_headers()
            self.wfile.write(b"catalog is being imported")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_a_node_of_a_cluster_is_asked_by_its_agent(tmp_path: Path) -> None:
    assert health.url_of(tmp_path) == "http://127.0.0.1:52365/api/healthz"


def test_an_installation_of_its_own_is_asked_for_readiness(tmp_path: Path) -> None:
    me = psutil.Process()
    head = Head(
        pid=os.getpid(),
        created=me.create_time(),
        home=tmp_path,
        temp_dir=tmp_path,
        token_path=tmp_path / "token",
        address="127.0.0.1:1",
        dashboard_url="http://127.0.0.1:2",
        http_port=8123,
        metric_ports=(3, 4),
        num_cpus=1,
    )
    (tmp_path / "head.json").write_text(head.model_dump_json())
    assert health.url_of(tmp_path) == "http://127.0.0.1:8123/readyz"


def test_only_200_is_healthy(answering: int) -> None:
    assert health.problem(f"http://127.0.0.1:{answering}/readyz") is None
    assert "503: catalog is being imported" in (health.problem(f"http://127.0.0.1:{answering}/") or "")
    assert "does not answer" in (health.problem("http://127.0.0.1:1/readyz") or "")


def test_the_exit_code_is_what_an_engine_reads(monkeypatch: pytest.MonkeyPatch, answering: int) -> None:
    monkeypatch.setenv("MANTA_HOME", "/nowhere")
    monkeypatch.setattr(health, "url_of", lambda _: f"http://127.0.0.1:{answering}/other")
    assert health.main([]) == 1
    assert health.main([f"http://127.0.0.1:{answering}/readyz"]) == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(health, "time", clock)
    return clock


def chart_tests() -> list[str]:
    """What the pod of `helm test` gives to this check."""
    command = one(render("minimal"), "Pod")["spec"]["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "cluster.health"]
    return list(command[3:])


def test_helm_test_asks_until_the_service_is_there(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """As right after `helm install`: the name is not known, then the proxy knows no route, then all is well."""
    answers = iter(["does not answer", "answers 404", None])
    monkeypatch.setattr(health, "problem", lambda _: next(answers))
    assert health.main(chart_tests()) == 0 and clock.now == 2 * health.RETRY_S


def test_helm_test_gives_up_before_helm_does(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(health, "problem", lambda _: "does not answer")
    assert health.main(chart_tests()) == 1
    minutes = re.search(r"helm test .*--timeout (\d+)m", (CHART / "README.md").read_text())
    assert minutes and 600 <= clock.now <= 60 * int(minutes[1]) - 120  # a pull of the image comes before
