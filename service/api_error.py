"""What the SDK raises: the service refused or failed, or there was no answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

BUSY_S = 2.0  # where one who is not there, or the proxy before it, does not say when to ask again
AWAY = (502, 503, 504)


class ApiError(Exception):
    """The service refused or failed; `str()` is what a person should read.

    Attributes:
        status: of HTTP; 0: there was no answer.
        title: the same for all of one code.
        detail: what was got and expected; `reason` is the same.
        hint: what to do.
        errors: each problem of an invalid request: `loc`, `message`, `hint`.
        code: by which programs tell errors apart, "NotDeployed"; "": what answered is no Manta.
        retry_after_s: the same request may succeed after so many seconds; None: it will not.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        hint: str = "",
        errors: Sequence[dict[str, Any]] = (),
        code: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        self.status, self.title, self.detail, self.hint, self.errors = status, title, detail, hint, list(errors)
        self.code, self.retry_after_s = code, retry_after_s
        super().__init__(status, title, detail, hint, errors, code, retry_after_s)

    @property
    def reason(self) -> str:
        return self.detail

    @property
    def retryable(self) -> bool:
        return self.retry_after_s is not None

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.detail}"]
        if len(self.errors) > 1 or (self.errors and not self.hint):
            lines = [f"{self.title}:"]
            for error in self.errors:
                hint = f" ({error['hint']})" if error.get("hint") else ""
                lines.append(f"  {'.'.join(map(str, error['loc']))}: {error['message']}{hint}")
        elif self.hint:
            lines.append(f"  {self.hint}")
        if self.retry_after_s:
            lines.append(f"  it may succeed after {self.retry_after_s:g} s")
        return "\n".join(lines)


def no_answer(url: str, error: httpx.TransportError) -> ApiError:
    again = None if isinstance(error, httpx.UnsupportedProtocol) else 0.0
    detail = f"{url} does not answer: {error}"
    return ApiError(0, "Not reachable", detail, "start it by `manta up`", retry_after_s=again)


def expect_answer(response: httpx.Response) -> None:
    """Raises ApiError where it is a refusal: of problem+json, or of whatever else stands between."""
    if not response.is_error:
        return
    response.read()
    status, wait = response.status_code, response.headers.get("retry-after", "")
    again = float(wait) if wait.isdigit() else BUSY_S if status in AWAY else None
    try:
        raise refusal(status, response.json(), again)
    except (ValueError, KeyError, TypeError):
        raise ApiError(status, response.reason_phrase, response.text[:500], retry_after_s=again) from None


def refusal(status: int, body: Any, retry_after_s: float | None = None) -> ApiError:
    """Of a problem document; raises KeyError or TypeError where it is none."""
    told = body["title"], body["detail"], body.get("hint", ""), body.get("errors", ()), body.get("code", "")
    return ApiError(status, *told, retry_after_s)
