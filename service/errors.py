"""Everything that the service refuses or cannot do, as one tree.

    ServiceError
    +-- NotFound             404  no such job, model, method
    +-- InvalidSpec          422  a JobSpec or body that cannot run; lists each problem
    +-- BadRequest           400  a request that means nothing: an empty batch, no base64
    |   +-- BadImage         422  bytes that are no image, or too many pixels
    +-- Unauthorised         401  no token
    |   +-- InvalidToken     401  one that is unknown, expired or revoked
    +-- Forbidden            403  a token whose role does not reach so far
    +-- TooSlow              408  a body that does not arrive in time
    +-- TooLarge             413  a body above the limit
    +-- TooMany              429  requests above the rate of the token; may be tried again
    +-- Conflict             409  the state does not allow it, or a key used for another body
    |   +-- NotDeployed      409  the model is registered, but nobody serves it
    +-- Unavailable          503  not now: starting, full, Ray not reachable; may be tried again

`service.app` turns each into `application/problem+json` (RFC 9457) in one place. They
cross processes, so they pickle, and keep their cause.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar


class ServiceError(Exception):
    """Base of the tree.

    Attributes:
        detail: what was got and expected.
        hint: what to do.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, hint: str = "") -> None:
        self.detail, self.hint = detail, hint
        super().__init__(detail, hint)

    def __str__(self) -> str:
        return f"{self.detail} ({self.hint})" if self.hint else self.detail

    @property
    def headers(self) -> dict[str, str]:
        """That the answer carries."""
        return {"Retry-After": "2"} if self.retryable else {}

    @property
    def code(self) -> str:
        return type(self).__name__

    def problem(self) -> dict[str, Any]:
        """The body of the answer."""
        body = {
            "type": f"urn:manta:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "hint": self.hint,
            "retryable": self.retryable,
        }
        return body


class NotFound(ServiceError):
    status, title = 404, "Not found"


class InvalidSpec(ServiceError):
    status, title = 422, "The job cannot run"

    def __init__(self, problems: list[dict[str, Any]]) -> None:
        first = problems[0]
        super().__init__(f"{'.'.join(map(str, first['loc']))}: {first['message']}", first.get("hint", ""))
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.problems,))

    def problem(self) -> dict[str, Any]:
        return super().problem() | {"errors": self.problems}


class BadRequest(ServiceError):
    status, title = 400, "Bad request"


class BadImage(BadRequest):
    status, title = 422, "Not a usable image"


class Unauthorised(ServiceError):
    status, title = 401, "Unauthorised"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Bearer realm="manta"'}


class InvalidToken(Unauthorised):
    """A token was given; RFC 6750 tells these two apart."""

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Bearer realm="manta", error="invalid_token"'}


class Forbidden(ServiceError):
    status, title = 403, "Forbidden"


class TooSlow(ServiceError):
    status, title = 408, "Too slow"


class TooLarge(ServiceError):
    status, title = 413, "Too large"


class TooMany(ServiceError):
    status, title, retryable = 429, "Too many requests", True

    def __init__(self, detail: str, hint: str = "", wait_s: float = 1.0) -> None:
        super().__init__(detail, hint)
        self.args, self.wait_s = (detail, hint, wait_s), wait_s  # args: what it is pickled by

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.wait_s)))}


class Conflict(ServiceError):
    status, title = 409, "Conflict"


class NotDeployed(Conflict):
    status, title = 409, "Not deployed"


class Unavailable(ServiceError):
    status, title, retryable = 503, "Unavailable", True
