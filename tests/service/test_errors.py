"""The tree of errors: as it is drawn, and as it crosses processes and the wire."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator

import pytest

from service import errors
from service.errors import InvalidRequest, MethodNotAllowed, ServiceError, TooMany
from service.problems import Problem, answer

LINE = re.compile(r"^    ((?:\|   |    )*)\+-- (\w+) +(\d{3})( retry)? {2,}\S", re.MULTILINE)
WRONG = [{"loc": ["body", 0], "message": "got x", "hint": "y"}]


def below(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


KINDS = [kind for kind in below(ServiceError) if kind.__module__ == errors.__name__]


def made(kind: type[ServiceError]) -> ServiceError:
    return kind(WRONG) if issubclass(kind, InvalidRequest) else kind("got x", "do y")  # type: ignore[arg-type]


def test_the_tree_is_the_one_that_is_drawn() -> None:
    drawn: set[tuple[str, str, int, bool]] = set()
    above = [ServiceError.__name__]
    for indent, name, status, retry in LINE.findall(errors.__doc__ or ""):
        above[1 + len(indent) // 4 :] = [name]
        drawn.add((above[-2], name, int(status), bool(retry)))
    exist = {(kind.__bases__[0].__name__, kind.__name__, kind.status, kind.retryable) for kind in KINDS}
    assert drawn == exist and len(exist) > 10
    assert [kind for kind in below(ServiceError) if kind not in KINDS] == []  # all of them are in this file


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_answer_has_what_programs_and_people_need(kind: type[ServiceError]) -> None:
    error = made(kind)
    response = answer(error, {"Connection": "close"})
    assert (response.status_code, response.media_type) == (kind.status, "application/problem+json")
    problem = Problem.model_validate_json(response.body)
    assert (problem.code, problem.type) == (kind.__name__, f"urn:manta:error:{kind.__name__}")
    assert problem.reason == problem.detail == ("body.0: got x" if problem.errors else "got x")
    assert problem.hint in ("do y", "y") and problem.title and problem.retryable == kind.retryable
    assert kind.retryable == ("retry-after" in response.headers) and response.headers["connection"] == "close"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_crosses_processes(kind: type[ServiceError]) -> None:
    error = made(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and (again.problem(), again.headers) == (error.problem(), error.headers)


def test_what_further_arguments_say_crosses_too() -> None:
    for error in (TooMany("a", "b", 7.2), MethodNotAllowed("a", "b", "GET, POST")):
        assert pickle.loads(pickle.dumps(error)).headers == error.headers
    assert TooMany("a", "b", 7.2).headers == {"Retry-After": "8"}


def test_what_has_no_utf8_is_told_in_utf8() -> None:
    body = answer(errors.NotFound("got \ud800 \u00e4", "no")).body
    assert json.loads(bytes(body).decode())["detail"] == "got ? \u00e4"
