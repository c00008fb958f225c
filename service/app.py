"""Builds the FastAPI app, and the Ray Serve application that runs it.

The one place where errors become answers, in the form of `service.problems`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from service.access import allowed_methods, authorise, without_rule
from service.contract import Documented
from service.errors import (
    BadRequest,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    Unavailable,
    UnsupportedMedia,
)
from service.gate import Gate
from service.headers import SECURITY, SecurityHeaders
from service.limits import BodyLimit, Rate
from service.observe.requests import Observed
from service.parts import Parts, build_parts
from service.problems import answer
from service.routes import catalog, health, jobs, metrics, models, people, predict, webhooks
from service.settings import Settings
from service.store import AWAY
from service.tokens import expect_tokens
from workloads import tracing
from workloads.log_lines import configure

logger = logging.getLogger(__name__)

MOST_REQUESTS = 200  # that a front end answers at a time; `service.streams` takes half of them at most
# FastAPI's own spans hold the raw path and query, where people put secrets; `service.observe` has ours.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}

GUARDED = [Depends(authorise)]
ROUTES = APIRouter(dependencies=GUARDED)  # shared by all apps of a process: FastAPI takes .3 s to draw them up
for _module in (jobs, catalog, predict, models, webhooks, people, health, metrics):
    ROUTES.include_router(_module.router)


def build(settings: Settings, parts: Parts | None = None) -> FastAPI:
    """The app; `parts` replaces those made from the settings.

    Raises:
        NoToken: it would listen beyond loopback and ask nobody for a token.
        RuntimeError: a route is not in `service.access.RULES`.
    """
    parts = parts or build_parts(settings)
    expect_tokens(settings, parts.tokens)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        parts.start()
        yield
        parts.stop()
        tracing.stop()

    app = Documented(lifespan=lifespan, dependencies=GUARDED, telemetry=NO_TELEMETRY)
    app.state.parts = parts
    app.router.routes += ROUTES.routes
    _docs(app)
    _errors(app)
    if unruled := without_rule(app.routes):
        raise RuntimeError(
            f"got {', '.join(unruled)} without a rule, expected one of each route; see service/access.py"
        )
    # From the inside out: what is added last sees a request first.
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes, timeout_s=settings.upload_timeout_s)
    rate, wrong = (Rate(settings.requests_per_s, settings.request_burst) for _ in range(2))
    origins = list(settings.cors_origins)
    app.add_middleware(Gate, tokens=parts.tokens, audit=parts.audit, rate=rate, wrong=wrong, origins=origins)
    if origins:
        headers = ["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=headers)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(Observed, metrics=parts.exposition.requests)
    return app


def _docs(app: FastAPI) -> None:
    """Swagger UI from an installed package: laptops are offline."""
    import swagger_ui

    app.mount("/docs/static", StaticFiles(directory=Path(swagger_ui.__file__).parent / "static"))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Manta",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/docs/static/favicon-32x32.png",
        )


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    def refused(_: Request, error: ServiceError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "none")
        problems = [{"loc": list(item["loc"]), "message": item["msg"], "hint": "see /docs"} for item in error.errors()]
        if isinstance(error.body, bytes) and any(problem["loc"] == ["body"] for problem in problems):
            return answer(UnsupportedMedia(f"got a body of type {kind!r}, expected application/json", "name its type"))
        return answer(InvalidRequest(problems))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        asked = f"got {request.method} {request.url.path}"
        if error.status_code == 404:
            return answer(NotFound(f"{asked}, which is no path of the service", "see /docs for the paths"))
        if error.status_code == 405:
            allowed = allowed_methods(request.url.path)
            return answer(MethodNotAllowed(f"{asked}, expected one of {allowed}", "see /docs for the paths", allowed))
        return answer(BadRequest(f"{asked}: {error.detail}", "see /docs for the body"))  # one that cannot be read

    def away(request: Request, error: Exception) -> Response:
        cause = getattr(error, "orig", error)
        logger.error("request %s: the database does not answer: %s", request.state.request_id, cause)
        return answer(Unavailable("the database does not answer", "try again; /readyz says what is missing"))

    for kind in AWAY:
        app.add_exception_handler(kind, away)

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        number = request.state.request_id
        about = {"request_id": number}  # those of the request's own layers are gone out here
        logger.error("request %s %s %s failed", number, request.method, request.url.path, exc_info=error, extra=about)
        failed = InternalError(f"request {number} failed", "the service's log has the cause")
        return answer(failed, SECURITY | {"X-Request-ID": number})


class Ingress:
    """What Ray Serve replicates; everything is in the app."""


def application(_: dict[str, Any]) -> Any:
    """What a Serve config names as `service.app:application`; settings are read where the replica runs, on the head."""
    return deployment(None)


def deployment(settings: Settings | None) -> Any:
    """The Ray Serve application of the front end; the app is built in the replica, so only settings travel.

    Args:
        settings: None: those of the replica's environment.
    """
    from ray import serve

    def builder() -> FastAPI:
        chosen = settings or Settings()
        configure(chosen.log_format)
        tracing.start("manta")
        return build(chosen)

    return serve.deployment(
        name="api",
        max_ongoing_requests=MOST_REQUESTS,
        max_queued_requests=2 * MOST_REQUESTS,
        # On the head, which no autoscaler ends, and which alone is told where the database is.
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        graceful_shutdown_timeout_s=5,
    )(serve.ingress(builder)(Ingress)).bind()
