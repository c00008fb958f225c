"""Builds the FastAPI app, and the Ray Serve application that runs it.

The one place where errors become answers: `application/problem+json`, RFC 9457.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import BadRequest, ServiceError, TooLarge
from service.parts import Parts, build_parts
from service.routes import catalog, health, jobs, models, predict
from service.settings import Settings

logger = logging.getLogger(__name__)

PROBLEM = "application/problem+json"


def build(settings: Settings, parts: Parts | None = None) -> FastAPI:
    """The app; `parts` replaces those made from the settings."""
    parts = parts or build_parts(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        parts.start()
        yield
        parts.stop()

    app = FastAPI(
        title="Manta",
        description="A distributed pretraining service on Ray.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.parts = parts
    for module in (jobs, catalog, predict, models, health):
        app.include_router(module.router)
    _docs(app)
    _errors(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
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


def _problem(body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    if body["retryable"]:
        headers = {"Retry-After": "2"} | (headers or {})
    return JSONResponse(body, body["status"], headers, PROBLEM)


def _plain(status: int, title: str, detail: str, hint: str = "", **more: Any) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "hint": hint,
        "retryable": False,
    } | more


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    def refused(_: Request, error: ServiceError) -> JSONResponse:
        return _problem(error.problem())

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = [{"loc": list(item["loc"]), "message": item["msg"], "hint": ""} for item in error.errors()]
        where = ".".join(map(str, errors[0]["loc"]))
        return _problem(_plain(422, "Invalid request", f"{where}: {errors[0]['message']}", "see /docs", errors=errors))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        hint = "see /docs for the paths" if error.status_code in (404, 405) else ""
        detail = f"{request.method} {request.url.path}: {error.detail}"
        return _problem(_plain(error.status_code, str(error.detail), detail, hint), dict(error.headers or {}))

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        request_id = uuid.uuid4().hex[:12]
        logger.error("request %s %s %s failed", request_id, request.method, request.url.path, exc_info=error)
        return _problem(
            _plain(500, "Internal error", f"request {request_id} failed", "the service's log has the cause")
        )


class BodyLimit:
    """Refuses a body that is too long, or does not say its length, before it is read.

    Plain ASGI: `@app.middleware("http")` would put a task and a stream between each request and its route, 1 ms.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (self._app if refusal is None else _problem(refusal.problem()))(scope, receive, send)

    def _refusal(self, headers: Headers) -> ServiceError | None:
        if "transfer-encoding" in headers:  # a body that does not say its length cannot be held to a limit
            return BadRequest("got a body of unknown length", "send a Content-Length header")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._limit:
            return TooLarge(f"got a body of {length} bytes, expected at most {self._limit}", "send less at a time")
        return None


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
        logging.basicConfig(level=logging.INFO)
        return build(settings or Settings())

    return serve.deployment(
        name="api",
        max_ongoing_requests=200,
        max_queued_requests=400,
        # On the head, which no autoscaler ends, and which alone is told where the database is.
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        graceful_shutdown_timeout_s=5,
    )(serve.ingress(builder)(Ingress)).bind()
