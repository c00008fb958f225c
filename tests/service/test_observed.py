"""A line and a span for each request, with the ids that lead on from it, and no secret."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.settings import Settings
from service.tokens import MIN_CHARACTERS
from tests.service.secured import BODY, Secured
from tests.service.test_secrets import submission
from workloads import tracing
from workloads.log_lines import noted

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    yield service
    service.close()


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.start("test", exporter)
    yield exporter
    tracing.stop()


class Kept(logging.Handler):
    """Records, each with what it was about when it was made."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        own = {name: getattr(record, name) for name in ("method", "route", "status", "ms") if hasattr(record, name)}
        line = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
        self.lines.append({**line, **own, **noted()})


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept, root = Kept(), logging.getLogger("service")
    root.addHandler(kept)
    before, _ = root.level, root.setLevel(logging.DEBUG)
    yield kept
    root.removeHandler(kept)
    root.setLevel(before)


def of_requests(kept: Kept) -> list[dict[str, object]]:
    return [line for line in kept.lines if line["logger"] == "service.observe.requests"]


def test_each_request_has_a_line_that_leads_on(service: Secured, kept: Kept) -> None:
    service.project("vision")
    service.token("root", "admin")
    token = service.token("ann", "submitter", "vision")
    made = service.client(token).post("/v1/jobs", json=BODY, headers={"X-Request-ID": "proxy-7"})
    job_id = made.json()["id"]
    service.client(token).get(f"/v1/jobs/{job_id}")
    first, second = of_requests(kept)
    assert first.pop("ms") > 0 and first.pop("message").startswith("POST /v1/jobs: 201 in ")  # type: ignore[operator, attr-defined]
    assert first == {
        "level": "INFO",
        "logger": "service.observe.requests",
        "method": "POST",
        "route": "/v1/jobs",
        "status": 201,
        "request_id": "proxy-7",
        "token": "ann",
        "project": "vision",
        "job_id": job_id,
    }
    assert made.headers["X-Request-ID"] == "proxy-7"
    assert (second["route"], second["job_id"], len(str(second["request_id"]))) == ("/v1/jobs/{job_id}", job_id, 16)
    assert dict(noted()) == {}


def test_refusals_bugs_and_probes(service: Secured, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    token = service.token("root", "admin")
    bad = "two words\r\nX: y"
    service.client("wrong").get("/v1/jobs", headers={"X-Request-ID": bad})

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(service.parts.jobs, "list", broken)
    service.client(token).get("/v1/jobs")
    service.client().get("/healthz")
    refused, failed, probe = of_requests(kept)
    assert (refused["status"], refused["route"], "token" in refused) == (401, "none", False)
    assert bad not in str(kept.lines) and len(str(refused["request_id"])) == 16
    assert (failed["status"], failed["token"]) == (500, "root")
    assert (probe["status"], probe["level"]) == (200, "DEBUG")


def test_the_reconciler_tells_which_job_it_is_at(service: Secured, kept: Kept) -> None:
    job_id = service.job()
    service.parts.reconciler.round()
    about = [line for line in kept.lines if line["logger"] in ("service.reconciler", "service.attempts")]
    assert about and all((line["job_id"], line["project"]) == (job_id, "default") for line in about)


def test_one_trace_tells_of_a_request_its_job_and_its_attempts(service: Secured, spans: InMemorySpanExporter) -> None:
    client = service.client(service.token("root", "admin"))
    job_id = client.post(
        "/v1/jobs?gpu=x", json=BODY, headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    ).json()["id"]
    client.get("/healthz")
    seen: list[str | None] = []
    service.ray.submit = lambda *_: seen.append(tracing.traceparent())  # type: ignore[method-assign]
    service.parts.reconciler.round()
    submit, request, attempt = spans.get_finished_spans()
    assert [span.name for span in (request, submit, attempt)] == ["POST /v1/jobs", "submit job", "submit attempt"]
    assert {format(span.context.trace_id, "032x") for span in (request, submit, attempt)} == {TRACE}
    assert submit.parent.span_id == request.context.span_id and attempt.parent.span_id == submit.context.span_id
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/jobs",
        "http.response.status_code": 201,
    }
    assert submit.attributes["manta.job.id"] == attempt.attributes["manta.job.id"] == job_id
    assert seen == [f"00-{TRACE}-{attempt.context.span_id:016x}-01"]


def test_a_job_gets_its_place_in_the_trace_and_the_format_of_lines(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    with tracing.span("submit attempt"):
        told = submission(Settings(home=tmp_path, log_format="json"))["runtime_env"]["env_vars"]
        assert told["TRACEPARENT"] == tracing.traceparent()
    assert told["MANTA_LOG_FORMAT"] == "json"


def test_without_traces_a_job_knows_of_none(service: Secured, tmp_path: Path) -> None:
    assert service.parts.jobs.get(service.job()).traceparent is None
    assert "TRACEPARENT" not in submission(Settings(home=tmp_path))["runtime_env"]["env_vars"]


def test_a_file_holds_the_token_of_the_scraper(tmp_path: Path) -> None:
    admin, file = tmp_path / "admin", tmp_path / "metrics"
    admin.write_text("a" * MIN_CHARACTERS)
    first, second = "m" * MIN_CHARACTERS, "n" * MIN_CHARACTERS
    for text in (first, first, second):  # started, started again, and with a new one
        file.write_text(text + "\n")
        service = Secured(tmp_path / "home", first_admin_token_file=admin, metrics_token_file=file)
        assert service.client(text).get("/metrics").status_code == 200
        assert service.client(text).post("/v1/jobs", json=BODY).status_code == 403
        known = service.parts.tokens.list(service.parts.tokens.authenticate("a" * MIN_CHARACTERS))
        service.close()
    assert [row.role for row in known].count("viewer") == 2
    assert [row.revoked_at is None for row in known if row.role == "viewer"].count(True) == 1
    again = Secured(tmp_path / "home", metrics_token_file=file)
    assert again.client(first).get("/metrics").status_code == 401
    again.close()
