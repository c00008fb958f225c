"""Everything that the service refuses or cannot do, as one tree: code, status, whether to ask again later.

    ServiceError
    +-- BadRequest           400        a request that means nothing: an empty batch, no base64
    |   +-- BadImage         422        bytes that are no image, or too many pixels
    +-- Unauthorised         401        no token
    |   +-- InvalidToken     401        one that is unknown, expired or revoked
    +-- Forbidden            403        a token whose role does not reach so far
    +-- NotFound             404        no such job, model, method, path
    +-- MethodNotAllowed     405        a path that is there, but not for this method
    +-- TooSlow              408        a body that does not arrive in time
    +-- Conflict             409        the state does not allow it, or a key used for another body
    |   +-- NotDeployed      409        the model is registered, but nobody serves it
    +-- TooLarge             413        a body above the limit
    +-- UnsupportedMedia     415        a body of another type than JSON
    +-- InvalidRequest       422        parameters or a body of another form; lists each problem
    |   +-- InvalidSpec      422        a JobSpec or SearchSpec that cannot run; lists each problem
    +-- TooMany              429 retry  above the rate of a token or address, too many streams, a project that is full
    +-- InternalError        500        a fault of the service; its log has the cause
    +-- Unavailable          503 retry  not now: starting, full; Ray, the database or data not reachable

The name of a class is the `code` of its answers. `service.app` turns each into `application/problem+json`
(`service.problems`) in one place; what is retryable says when by Retry-After. They cross processes, so they pickle,
and keep their cause.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar


class ServiceError(Exception):
    """Base of the tree.

    Attributes:
        status: of HTTP.
        title: the same for all of a class.
        retryable: the same request may succeed later.
        detail: what was got and expected.
        hint: what to do.
    """

    status: ClassVar[int]
    title: ClassVar[str]
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
        return {
            "type": f"urn:manta:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "reason": self.detail,  # as jobs and deployments call it
            "hint": self.hint,
            "retryable": self.retryable,
        }


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


class NotFound(ServiceError):
    status, title = 404, "Not found"


class MethodNotAllowed(ServiceError):
    """`headers` has Allow: the methods that there are."""

    status, title = 405, "Method not allowed"

    def __init__(self, detail: str, hint: str = "", allowed: str = "") -> None:
        super().__init__(detail, hint)
        self.args, self.allowed = (detail, hint, allowed), allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": self.allowed}


class TooSlow(ServiceError):
    status, title = 408, "Too slow"


class Conflict(ServiceError):
    status, title = 409, "Conflict"


class NotDeployed(Conflict):
    status, title = 409, "Not deployed"


class TooLarge(ServiceError):
    status, title = 413, "Too large"


class UnsupportedMedia(ServiceError):
    status, title = 415, "Unsupported media type"


class InvalidRequest(ServiceError):
    """Lists each problem: `loc`, the path to it, `message` and `hint`."""

    status, title = 422, "Invalid request"

    def __init__(self, problems: list[dict[str, Any]]) -> None:
        first = problems[0]
        detail = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["message"]]))
        super().__init__(detail, first.get("hint", ""))
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.problems,))

    def problem(self) -> dict[str, Any]:
        return super().problem() | {"errors": self.problems}


class InvalidSpec(InvalidRequest):
    status, title = 422, "The job cannot run"


class TooMany(ServiceError):
    status, title, retryable = 429, "Too many requests", True

    def __init__(self, detail: str, hint: str = "", wait_s: float = 1.0) -> None:
        super().__init__(detail, hint)
        self.args, self.wait_s = (detail, hint, wait_s), wait_s  # args: what it is pickled by

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.wait_s)))}


class InternalError(ServiceError):
    status, title = 500, "Internal error"


class Unavailable(ServiceError):
    status, title, retryable = 503, "Unavailable", True
