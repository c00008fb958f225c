"""The first look at a request: who asks, how often, and under which number it is told of.

Nobody guesses 256 bits, but each wrong token costs a thread and a query: those of an address are bounded by the rate of
a token. One that was good a while ago is looked up whatever else comes from its address, which may be that of a proxy.

A service without tokens answers the machine it runs on and nobody else, whatever address it listens on; it asks the
address of the client, and the Host and Origin that a web page in a browser of this machine cannot make up. Behind a
proxy of this machine these would be the proxy's, so what a proxy passes on is refused.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import PUBLIC, PUBLIC_FOLDER
from service.audit import Audit
from service.errors import BadRequest, Forbidden, InvalidToken, ServiceError, Unauthorised, Unavailable
from service.limits import Rate
from service.principal import LOCAL, Principal
from service.problems import answer
from service.settings import is_loopback
from service.tokens import Tokens
from workloads import log_lines

logger = logging.getLogger(__name__)

ASK = "send `Authorization: Bearer TOKEN`; the command line takes it from MANTA_TOKEN"
SAFE = ("GET", "HEAD", "OPTIONS")
OF_PROXIES = ("forwarded", "via", "x-real-ip", "x-forwarded-")  # headers that one adds, or how their names begin


class Gate:
    """Plain ASGI; puts `principal` and `request_id` into the state of the request, and ends its audit entry.

    `service.access` adds `changes` before that of a change is begun.
    """

    def __init__(
        self, app: ASGIApp, tokens: Tokens, audit: Audit, rate: Rate, wrong: Rate, origins: Sequence[str]
    ) -> None:
        """Keeps its parts.

        Args:
            app: what is behind it.
            tokens: known ones.
            audit: the log of changes.
            rate: of the requests of each token.
            wrong: of the wrong tokens of each address.
            origins: of web pages that may ask.
        """
        self._app, self._tokens, self._audit, self._origins = app, tokens, audit, origins
        self._rate, self._wrong = rate, wrong

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, state = Headers(scope=scope), dict(scope.get("state", {}))
        scope["state"] = state  # of this request: servers may give all the same one
        state["request_id"] = _request_id(headers)
        log_lines.note(request_id=state["request_id"])
        noted = False

        async def note(status: int, location: str = "") -> None:
            nonlocal noted
            if "audit" in state and not noted:
                noted = True
                made = state.get("made") or tuple(filter(None, [location.rpartition("/")[2]]))
                result = state["audit"], status, made, state.get("project", "")
                try:
                    await run_in_threadpool(self._audit.finish, *result)
                except SQLAlchemyError as error:  # the change is made: its answer must not say otherwise
                    logger.error("the result of audit entry %s is not written: %s, %s", *result[:2], error)

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = MutableHeaders(scope=message)
                more["X-Request-ID"] = state["request_id"]
                await note(message["status"], more.get("location", ""))
            await send(message)

        async def answered() -> None:
            try:
                if "\0" in scope["path"]:
                    raise BadRequest("got a NUL in the path, expected none", "PostgreSQL takes none; see /docs")
                if scope["path"] not in PUBLIC and not scope["path"].startswith(PUBLIC_FOLDER):
                    state["principal"] = await self._who(scope, headers)
                    log_lines.note(token=state["principal"].name)
                await self._app(scope, receive, numbered)
            except ServiceError as error:
                logger.info("request %s of %s is refused: %s", state["request_id"], scope.get("client"), error.detail)
                await answer(error)(scope, receive, numbered)
            except Exception:
                await note(500)
                raise

        await (answered() if scope["method"] in SAFE else _to_its_end(answered(), state))

    async def _who(self, scope: Scope, headers: Headers) -> Principal:
        """The principal.

        Raises:
            Unauthorised: no token where one is needed, or a wrong one.
            Forbidden: from elsewhere, to a service that has no tokens.
            TooMany: above the rate of the token, or of wrong ones from its address.
            Unavailable: the database does not answer.
        """
        try:
            needed = self._tokens.needed() if self._tokens.sure else await run_in_threadpool(self._tokens.needed)
            if not needed:
                self._expect_local(scope, headers)
                return LOCAL
            text = _bearer(headers)
            principal = self._tokens.known(text) or await self._looked_up(text, _address(scope))
        except SQLAlchemyError as error:
            raise Unavailable("tokens cannot be looked up", "try again; /readyz says what is missing") from error
        self._rate.take(principal.token_id or principal.name)
        return principal

    async def _looked_up(self, text: str, address: str) -> Principal:
        if not self._tokens.was_good(text):
            self._wrong.expect(address)
        try:
            return await run_in_threadpool(self._tokens.authenticate, text)
        except InvalidToken:
            self._wrong.take(address)
            raise

    def _expect_local(self, scope: Scope, headers: Headers) -> None:
        client = _address(scope)
        if not is_loopback(client):
            raise Forbidden(
                f"got a request from {client or 'nowhere'}; a service without tokens serves its own machine only",
                "make the first token there: manta token create NAME --role admin --all-projects",
            )
        if passed_on := [name for name in headers if name.startswith(OF_PROXIES)]:
            raise Forbidden(
                f"got {passed_on[0]}, so from a proxy, which may ask for anybody; without tokens only this machine may",
                "make the first token there: manta token create NAME --role admin --all-projects",
            )
        host = headers.get("host", "")
        if not is_loopback(re.sub(r":\d*$", "", host)):
            raise Forbidden(f"got Host {host!r}, expected localhost", "ask http://127.0.0.1")
        origin = headers.get("origin")
        ours = origin is None or origin in self._origins or origin.partition("://")[2] == host
        if scope["method"] not in SAFE and not ours:
            raise Forbidden(f"got a change from a page of {origin}", "name it in MANTA_CORS_ORIGINS if it is yours")


async def _to_its_end(answered: Coroutine[Any, Any, None], state: Mapping[str, Any]) -> None:
    """Awaits what may make a change. Ray Serve cancels a request whose client hangs up: a change goes on to its result.

    Its thread would go on in any case, and what it made would be in no entry of the audit log.
    """
    task = asyncio.create_task(answered)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if "changes" not in state:
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("request %s, whose client had gone, failed", state["request_id"], exc_info=error)
        raise


def _address(scope: Scope) -> str:
    address: str = (scope.get("client") or ("",))[0]
    return address


def _bearer(headers: Headers) -> str:
    given = headers.get("authorization")
    if given is None:
        raise Unauthorised("got no token", ASK)
    scheme, _, text = given.partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise InvalidToken("got another kind of Authorization, expected a bearer token", ASK)
    return text.strip()


def _request_id(headers: Headers) -> str:
    """That of the proxy in front, if it gave one that can stand in a log."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
