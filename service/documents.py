"""JSON of requests that is kept as it came: what no database, file system or further program would take is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from service.declarations import MOST_INT
from service.errors import TooLarge

DEPTH = 64  # of objects and lists within each other
MOST_BYTES = 4 << 20  # of a request without images, and so of a list of jobs
MOST_JOB_BYTES = 1 << 20  # of its spec: each round reads those of all that wait
SHORTER = "name many shards by a pattern with braces, as in /data/train-{000000..000999}.tar"


def sound(document: dict[str, Any]) -> dict[str, Any]:
    """The document.

    Raises:
        ValueError: it has a NUL or half of a surrogate pair in a text, a number that is not finite or has more than 64
            bits, or is nested too deeply.
    """
    left: list[tuple[Any, int]] = [(document, 1)]
    while left:
        value, depth = left.pop()
        if depth > DEPTH:
            raise ValueError(f"got objects and lists more than {DEPTH} deep, expected fewer; make them flat")
        if isinstance(value, dict):
            left += ((one, depth + 1) for pair in value.items() for one in pair)
        elif isinstance(value, list):
            left += ((one, depth + 1) for one in value)
        elif isinstance(value, str):
            if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"got {value[:40]!a}, expected a text without NUL and without half a surrogate pair")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"got {value}, expected a number that is finite, as JSON has them")
        elif isinstance(value, int) and abs(value) > MOST_INT:
            raise ValueError("got an integer of more than 64 bits, expected a smaller one")
    return document


def expect_short(jobs: Sequence[dict[str, Any]]) -> None:
    """Refuses specs of jobs that are too long.

    Raises:
        TooLarge: one is, or all of them together.
    """
    sizes = [len(json.dumps(job)) for job in jobs]
    if max(sizes) > MOST_JOB_BYTES:
        raise TooLarge(f"got a job of {max(sizes)} bytes of JSON, expected at most {MOST_JOB_BYTES}", SHORTER)
    if sum(sizes) > MOST_BYTES:
        raise TooLarge(f"got jobs of {sum(sizes)} bytes of JSON, expected at most {MOST_BYTES}", SHORTER)


Document = Annotated[dict[str, Any], AfterValidator(sound)]
