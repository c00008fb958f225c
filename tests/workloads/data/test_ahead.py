"""A thread that makes things before they are asked for: when it does, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing

import pytest

from tests.waiting import until
from workloads.data.ahead import ahead


class Source:
    """Yields 0, 1, ..., and raises at one of them if told."""

    def __init__(self, stop: int, bad: int | None = None) -> None:
        self.stop, self.bad, self.begun, self.closed = stop, bad, 0, False

    def items(self) -> Generator[int]:
        try:
            for number in range(self.stop):
                self.begun = number + 1
                if number == self.bad:
                    raise ValueError("bad item")
                yield number
        finally:
            self.closed = True


@pytest.mark.parametrize("quiet", [None, threading.Event()], ids=["at once", "in quiet moments"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_order_and_end_are_those_of_the_source(depth: int, quiet: threading.Event | None) -> None:
    source = Source(20)
    assert list(ahead(source.items(), depth, quiet)) == list(range(20))
    assert source.closed


def test_an_error_comes_where_it_happened() -> None:
    source = Source(5, bad=2)
    items = ahead(source.items(), 3)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="bad item"):
        next(items)
    assert source.closed


def test_it_is_so_far_ahead_and_no_further() -> None:
    source = Source(20)
    with closing(ahead(source.items(), 2)) as items:
        next(items)
        until(lambda: source.begun == 3, "two items wait")
        next(items)
        until(lambda: source.begun == 4, "two items wait again")


def test_items_are_begun_in_quiet_moments() -> None:
    source, quiet = Source(20), threading.Event()
    with closing(ahead(source.items(), 2, quiet)) as items:
        assert next(items) == 0
        quiet.set()
        until(lambda: source.begun == 3, "two items wait")
        assert next(items) == 1  # it was made, since the one after it was begun
        assert not quiet.is_set() and source.begun == 3
        quiet.set()
        until(lambda: source.begun == 4, "two items wait again")


def test_what_is_waited_for_is_begun_without_a_quiet_moment() -> None:
    """As where a step has nothing to differentiate."""
    source, quiet = Source(20), threading.Event()
    with closing(ahead(source.items(), 1, quiet)) as items:
        assert [next(items) for _ in range(6)] == list(range(6))


def test_closing_does_not_wait_for_a_quiet_moment() -> None:
    source, quiet = Source(20), threading.Event()
    items = ahead(source.items(), 1, quiet)
    assert [next(items), next(items)] == [0, 1]
    quiet.clear()
    items.close()
    assert source.closed
