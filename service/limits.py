"""How much one may send: requests by the second, bytes of a body, seconds until it is here.

Plain ASGI: `@app.middleware("http")` would put a task and a stream between each request and its route, 1 ms.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.documents import MOST_BYTES, SHORTER
from service.errors import ServiceError, TooLarge, TooMany, TooSlow
from service.problems import answer

HANG_UP = {"Connection": "close"}  # nobody waits for the rest of a body that is refused
OF_IMAGES = ("/v1/models/", "/v2/models/")
MAX_BUCKETS = 10_000  # the longest unused is forgotten: it is full again


class Rate:
    """A token bucket for each key: `burst` at once, `per_s` in the long run. Of this process alone."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> left, when

    def take(self, key: str) -> None:
        """Takes one request out of the bucket.

        Raises:
            TooMany: it is empty; says when it holds one again.
        """
        self._buckets[key] = self.expect(key) - 1, self._clock()
        self._buckets.move_to_end(key)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)

    def expect(self, key: str) -> float:
        """What is in the bucket, out of which nothing is taken; raises as `take` does."""
        now = self._clock()
        left, since = self._buckets.get(key, (float(self._burst), now))
        left = min(self._burst, left + (now - since) * self._per_s)
        if left < 1:
            detail = f"got more than {self._burst} requests at once, or {self._per_s:g} a second in the long run"
            raise TooMany(detail, "ask less often, after Retry-After seconds", (1 - left) / self._per_s)
        return left


class BodyLimit:
    """Refuses a body that is too long or too slow: at once where it says its length, else while it arrives.

    Images go to models; what goes elsewhere is a document, and never as long.
    """

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float) -> None:
        self._app, self._limit, self._timeout_s = app, limit, timeout_s

    def _most(self, path: str) -> tuple[int, str]:
        """Bytes of a body that is sent there, and what to do about more."""
        if path.startswith(OF_IMAGES):
            return self._limit, "send less at a time"
        return min(self._limit, MOST_BYTES), f"send less at a time; {SHORTER}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "0")
        limit, hint = self._most(scope["path"])
        if not length.isdigit() or int(length) > limit:
            refusal = TooLarge(f"got a body of {length} bytes, expected at most {limit}", hint)
            return await answer(refusal, HANG_UP)(scope, receive, send)
        body = _Body(receive, send, TooLarge(f"got a body of more than {limit} bytes", hint), limit, self._timeout_s)
        try:
            await self._app(scope, body.receive, body.send)
        except ServiceError as error:
            if error is not body.refusal:
                raise
        if body.refusal is not None and not body.answered:
            await answer(body.refusal, HANG_UP)(scope, receive, send)


class _Body:
    """The body of one request on its way in.

    What reads it may turn the refusal into an answer of its own (FastAPI makes 400 of any error), so that is held back.
    """

    def __init__(self, receive: Receive, send: Send, too_large: TooLarge, limit: int, timeout_s: float) -> None:
        self._receive, self._send, self._too_large = receive, send, too_large
        self._limit, self._timeout_s = limit, timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._got = 0
        self._complete = False
        self.refusal: ServiceError | None = None
        self.answered = False

    async def receive(self) -> Message:
        if self._complete:  # what comes now is that the client left
            return await self._receive()
        if self.refusal is not None:
            raise self.refusal
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            detail = f"got {self._got} bytes of a body in {self._timeout_s:g} s, expected all of it"
            self.refusal = TooSlow(detail, "send less at a time, or on a faster line")
            raise self.refusal from None
        self._got += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._got > self._limit:
            self.refusal = self._too_large
            raise self.refusal
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is None or self.answered:
            self.answered = True
            await self._send(message)
