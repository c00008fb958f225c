"""Traces: off and free without their variables; with them one trace from a request into the run, over processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from workloads import tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.start("test", exporter)
    yield exporter
    tracing.stop()


@pytest.mark.parametrize(
    ("variables", "on"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_standard_variables_decide(variables: dict[str, str], on: bool) -> None:
    assert tracing.wanted(variables) is on


def test_without_them_nothing_is_imported_and_nothing_done() -> None:
    code = (
        "import sys; from workloads import tracing; tracing.start('x')\n"
        "with tracing.span('a', {'b': 1}, headers={}) as span: assert span is None and tracing.traceparent() is None\n"
        "tracing.stop(); assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_spans_nest_and_go_on_in_another_process(spans: InMemorySpanExporter) -> None:
    with tracing.span("submit job", {"manta.project": "vision"}):
        carried = tracing.traceparent()
    with tracing.span("run", parent=carried), tracing.span("work"):
        pass
    submit, work, run = spans.get_finished_spans()
    assert [span.name for span in (submit, run, work)] == ["submit job", "run", "work"]
    assert run.parent.span_id == submit.context.span_id and work.parent.span_id == run.context.span_id
    assert len({span.context.trace_id for span in (submit, run, work)}) == 1
    assert submit.attributes == {"manta.project": "vision"}


def test_headers_and_a_parent_are_gone_on_from(spans: InMemorySpanExporter) -> None:
    for given in ({"headers": {"traceparent": PARENT}}, {"parent": PARENT}, {"parent": "nonsense"}, {"headers": {}}):
        with tracing.span("x", **given):  # type: ignore[arg-type]
            pass
    traces = [format(span.context.trace_id, "032x") for span in spans.get_finished_spans()]
    assert traces[:2] == [PARENT.split("-")[1]] * 2 and len(set(traces)) == 3
    assert [span.kind.name for span in spans.get_finished_spans()] == ["SERVER", "INTERNAL", "INTERNAL", "SERVER"]


def test_an_error_is_told(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError), tracing.span("x"):
        raise ValueError("bad")
    (span,) = spans.get_finished_spans()
    assert not span.status.is_ok and span.events[0].name == "exception"


class Collector(HTTPServer):
    """An OTLP receiver on loopback."""

    def __init__(self) -> None:
        self.got: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append(request)
        self.server.headers.append({"path": self.path, **self.headers})
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.shutdown()
    collector.server_close()


def test_a_job_sends_its_run_to_the_collector(collector: Collector, tmp_path: Path) -> None:
    """`workloads.run` as Ray starts it: a job that is refused by its own look at the data, which takes no training."""
    job = tmp_path / "job.yaml"
    job.write_text(
        "{name: toy, method: {name: mae}, model: {name: vit, image_size: 8, patch_size: 4, dim: 32, depth: 1, heads: 2}"
        ", data: {train: {shards: /nowhere/x.tar}}, epochs: 1, batch_size: 8}"
    )
    environment = os.environ | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=sesame",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        "TRACEPARENT": PARENT,
        "MANTA_HOME": str(tmp_path),
        "MANTA_JOB_ID": "job-1",
        "MANTA_ATTEMPT": "2",
        "MANTA_LOG_FORMAT": "json",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "workloads.run", str(job)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    (sent,) = collector.got
    assert collector.headers[0]["path"] == "/v1/traces" and collector.headers[0]["api-key"] == "sesame"
    (resource,) = sent.resource_spans
    of = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert (of["service.name"], of["deployment.environment.name"]) == ("manta-run", "test")
    (run,) = resource.scope_spans[0].spans
    assert (run.name, run.trace_id.hex(), run.parent_span_id.hex()) == ("run", *PARENT.split("-")[1:3])
    told = {item.key: item.value.string_value or item.value.int_value for item in run.attributes}
    assert told == {"manta.job.id": "job-1", "manta.job.attempt": 2, "process.exit.code": 1}


def test_a_missing_extra_is_said_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    tracing.start("x")
    assert tracing.off() and "pip install 'manta[otel]'" in caplog.text


def test_another_protocol_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    tracing.start("x")
    assert tracing.off() and "expected otlp by http/protobuf" in caplog.text
