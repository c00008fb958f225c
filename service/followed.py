"""A stream of the service as its client sees it: one, over as many connections as it takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from service.api_error import ApiError, expect_answer, no_answer, refusal
from service.retries import Retries


def follow(http: httpx.Client, path: str, parameters: dict[str, Any], retries: Retries) -> Iterator[str]:
    """Data of each event until the stream says that it ends; behind the last event where a connection ended before.

    Raises:
        ApiError: it is refused, also later: a token was revoked; or nobody answers any more.
    """
    headers: dict[str, str] = {}
    while True:
        try:
            with http.stream("GET", path, params=parameters | {"follow": True}, headers=headers) as response:
                expect_answer(response)
                for event in _events(response.iter_bytes()):
                    retries.succeeded()
                    if "id" in event:
                        headers["Last-Event-ID"] = event["id"]
                    kind = event.get("event")
                    if kind == "end":
                        return
                    if kind == "refused":
                        problem = json.loads(event["data"])
                        raise refusal(problem["status"], problem)
                    if "data" in event:
                        yield event["data"]
            retries.rest()
        except httpx.TransportError as error:
            retries.wait(no_answer(str(http.base_url), error))
        except ApiError as error:
            retries.wait(error)


def _events(chunks: Iterable[bytes]) -> Iterator[dict[str, str]]:
    """Fields of each event; of a comment none. What a broken connection left of one is none."""
    left, fields = b"", dict[str, str]()
    for chunk in chunks:
        *lines, left = (left + chunk).split(b"\n")
        for line in lines:
            name, colon, value = line.decode().rstrip("\r").partition(":")
            if not name and not colon:
                yield fields
                fields = {}
                continue
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
