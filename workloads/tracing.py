"""Traces by OpenTelemetry: on where its standard variables name an endpoint, else nothing is imported and nothing done.

    request (front end) -> submit job (front end) -> attempt (reconciler) -> run (the job's process) -> train, conclude

The job's row keeps the `traceparent` of its submission, and the environment of an attempt hands it on, so that one
trace tells the whole job, whichever process died in between. Sampler, headers, timeouts, batches: as
the SDK reads them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

from workloads.log_lines import about

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP = "http/protobuf"
FLUSH_MS = 5000  # for the last spans of a process; the collector may be away
_provider: Any = None  # of this process; None: no traces


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the variables ask for traces."""
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    none = environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
    return not off and not none and any(environment.get(name) for name in ENDPOINTS)


def off() -> bool:
    return _provider is None


def start(service: str, exporter: Any = None) -> None:
    """Begins to trace what this process does; what is missing for that is said in the log, and ends nothing.

    Args:
        service: its name where OTEL_SERVICE_NAME gives none.
        exporter: takes the spans in place of the collector that the variables name.
    """
    global _provider
    if _provider is not None or (exporter is None and not wanted()):
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        processor = BatchSpanProcessor(_otlp()) if exporter is None else SimpleSpanProcessor(exporter)
    except (ImportError, ValueError) as error:
        logger.error("no traces are sent although OTEL_EXPORTER_OTLP_ENDPOINT is set: %s", error)
        return
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": service}))
    _provider = TracerProvider(resource=resource)
    _provider.add_span_processor(processor)


def _otlp() -> Any:
    """The exporter that the variables ask for.

    Raises:
        ImportError: it is not installed.
        ValueError: they ask for one that there is not.
    """
    kind = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), HTTP)
    if (kind, protocol) != ("otlp", HTTP):
        raise ValueError(f"got OTEL_TRACES_EXPORTER {kind} by {protocol}, expected otlp by {HTTP}; set these two")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ImportError(f"{error}; install manta with its extra: pip install 'manta[otel]'") from error
    return OTLPSpanExporter()


def stop() -> None:
    """Sends what is left."""
    global _provider
    provider, _provider = _provider, None
    if provider is not None:
        provider.force_flush(FLUSH_MS)
        provider.shutdown()


def span(
    name: str,
    attributes: Mapping[str, Any] = MappingProxyType({}),
    *,
    parent: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> AbstractContextManager[Any]:
    """What happens within, as a part of what happens around it; an exception that leaves it is its error.

    Args:
        name: of few different ones: no ids.
        attributes: what it is about.
        parent: a `traceparent` (W3C), instead of what is around it.
        headers: of a request, which may carry one as OTEL_PROPAGATORS says; makes it the span of a server.

    Returns:
        A context manager that gives the span; None where nothing is traced.
    """
    return nullcontext() if _provider is None else _span(name, attributes, parent, headers)


@contextmanager
def _span(
    name: str, attributes: Mapping[str, Any], parent: str | None, headers: Mapping[str, str] | None
) -> Iterator[Any]:
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    around, kind = None, SpanKind.INTERNAL
    if headers is not None:
        around, kind = propagate.extract(headers), SpanKind.SERVER
    elif parent is not None:
        around = _w3c().extract({"traceparent": parent})
    tracer = _provider.get_tracer("manta")
    with tracer.start_as_current_span(name, around, kind, attributes) as made, about(trace_id=_hex(made)):
        yield made


def traceparent() -> str | None:
    """Where we are, for another process to go on from; None where nothing is traced."""
    carrier: dict[str, str] = {}
    if _provider is not None:
        _w3c().inject(carrier)
    return carrier.get("traceparent")


def _hex(made: Any) -> str:
    return format(made.get_span_context().trace_id, "032x")


def _w3c() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()
