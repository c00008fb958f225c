"""JSON of requests that is kept as it came: what no database, file system or further program would take is refused."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator

from service.declarations import MOST_INT

DEPTH = 64  # of objects and lists within each other


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


Document = Annotated[dict[str, Any], AfterValidator(sound)]
