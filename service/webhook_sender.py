"""Sends messages to webhooks over HTTP, many at a time, each within a deadline."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from service.errors import BadRequest
from service.webhook_targets import Resolve, addresses, expect_url, request

logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells each URL, and that of a webhook may be a secret

DEADLINE_S = 10.0  # from the look at the name to the head of the answer


@dataclass(frozen=True)
class Message:
    """A POST, signed."""

    url: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Outcome:
    """What came of it; `error` is None where it was accepted."""

    status: int | None = None
    error: str | None = None


class Sender:
    """Used by one thread; any other may stop it."""

    def __init__(self, allowed: Collection[str], transport: httpx.AsyncBaseTransport | None, find: Resolve) -> None:
        """Keeps its parts.

        Args:
            allowed: hosts whose addresses may be private.
            transport: for tests, `httpx.MockTransport`.
            find: resolves names.
        """
        self._allowed, self._transport, self._find = allowed, transport, find
        self._stopped = False
        self._under_way: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def send(self, messages: Sequence[Message]) -> list[Outcome]:
        """Sends them at the same time.

        Raises:
            asyncio.CancelledError: it was stopped; whether they came is not known.
        """
        return asyncio.run(self._send(messages))

    def stop(self) -> None:
        """Breaks off what is under way, and what is sent later."""
        self._stopped = True
        if under_way := self._under_way:
            loop, task = under_way
            loop.call_soon_threadsafe(task.cancel)

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """Authorities: certifi's, or those of SSL_CERT_FILE and SSL_CERT_DIR."""
        return httpx.create_ssl_context()

    async def _send(self, messages: Sequence[Message]) -> list[Outcome]:
        task = asyncio.current_task()
        assert task is not None
        self._under_way = (asyncio.get_running_loop(), task)
        if self._stopped:
            task.cancel()
        try:
            transport = self._transport or httpx.AsyncHTTPTransport(verify=self._trusted)
            # trust_env: a proxy would resolve the name once more; timeout: DEADLINE_S is all of it, not of each read
            async with httpx.AsyncClient(
                transport=transport, trust_env=False, follow_redirects=False, timeout=None
            ) as client:
                return await asyncio.gather(*(self._in_time(client, message) for message in messages))
        finally:
            self._under_way = None

    async def _in_time(self, client: httpx.AsyncClient, message: Message) -> Outcome:
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await self._post(client, message)
        except TimeoutError:
            return Outcome(error=f"no answer in {DEADLINE_S:g} s")
        except BadRequest as error:
            return Outcome(error=error.detail)
        except (httpx.HTTPError, OSError, ValueError) as error:
            return Outcome(error=f"{type(error).__name__}: {error}"[:200])

    async def _post(self, client: httpx.AsyncClient, message: Message) -> Outcome:
        """Sends to the first address that can be connected to. The body of the answer is not read."""
        url = expect_url(message.url)
        *others, last = await addresses(url, self._allowed, self._find)
        for address in (*others, last):
            try:
                answer = await client.send(request(url, address, message.body, message.headers), stream=True)
            except httpx.ConnectError:
                if address == last:
                    raise
                continue
            await answer.aclose()
            if answer.is_success:
                return Outcome(answer.status_code)
            more = "; redirects are not followed" if answer.is_redirect else ""
            return Outcome(answer.status_code, f"got {answer.status_code}, expected 2xx{more}")
        raise AssertionError
