"""Each request, measured, told in the log and traced: by the template of its route, never by its raw path.

Outermost of the app's own layers, so it sees refusals too. The time of an answer is that until it begins: a log that
is followed goes on for hours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

from prometheus_client import Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.principal import ALL
from workloads import tracing
from workloads.log_lines import about, note

logger = logging.getLogger(__name__)

METHODS = frozenset(("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"))
NO_ROUTE = "none"  # refused before a route was looked for, or there is none such
QUIET = ("/healthz", "/readyz", "/metrics")  # machines ask all the time: no trace, no line above the level DEBUG
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class RequestMetrics(Collector):
    def __init__(self) -> None:
        self.duration = Histogram(
            "manta_http_request_duration_seconds",
            "Time until an answer began, by the template of the route.",
            ["method", "route", "status"],
            registry=None,
            buckets=SECONDS,
        )
        self.open = Gauge("manta_http_requests_in_progress", "Requests whose answer has not ended.", registry=None)

    def collect(self) -> Iterator[Metric]:
        return chain(self.duration.collect(), self.open.collect())


class Observed:
    """Plain ASGI."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        method = scope["method"] if scope["method"] in METHODS else "other"
        began = time.perf_counter()
        told = False

        def tell(status: int) -> None:
            nonlocal told
            if told:
                return
            told = True
            seconds, route = time.perf_counter() - began, _route(scope)
            self._metrics.duration.labels(method, route, status).observe(seconds)
            if span is not None:
                span.update_name(f"{method} {route}")
                span.set_attributes({"http.route": route, "http.response.status_code": status})
            level = logging.DEBUG if route in QUIET else logging.INFO
            fields = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 1)}
            logger.log(level, "%s %s: %d in %.1f ms", *fields.values(), extra=fields)

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note_result(scope, MutableHeaders(scope=message).get("location", ""))
                tell(message["status"])
            await send(message)

        with about(), _span(scope, method) as span, self._metrics.open.track_inprogress():
            try:
                await self._app(scope, receive, seen)
            except Exception:
                tell(500)  # the answer is made further out
                raise


def _span(scope: Scope, method: str) -> AbstractContextManager[Any]:
    if tracing.off() or scope["path"] in QUIET:
        return nullcontext()
    return tracing.span(method, {"http.request.method": method}, headers=dict(Headers(scope=scope)))


def _route(scope: Scope) -> str:
    """The template of the route that took the request."""
    path: str = getattr(scope.get("route"), "path", NO_ROUTE)
    return path


def _note_result(scope: Scope, location: str) -> None:
    """The project that a request was about, and the job that it made."""
    state = scope.get("state", {})
    principal = state.get("principal")
    project = state.get("project") or (principal.project if principal is not None else ALL)
    if project != ALL:
        note(project=project)
    if location.startswith("/v1/jobs/"):
        note(job_id=location.rpartition("/")[2])
