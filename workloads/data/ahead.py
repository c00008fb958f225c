"""A thread that makes things before they are asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


def ahead(
    source: Generator[T, None, None], depth: int, quiet: threading.Event | None = None
) -> Generator[T, None, None]:
    """What a generator yields, made by one thread up to `depth` items ahead of the consumer.

    What the source raises is raised at the item where it happened. Closing this closes the source, in this thread.

    Args:
        source: yields no None.
        depth: items that wait while the consumer works on one.
        quiet: set by the consumer where it leaves the interpreter to others for a while. It is cleared as an item is
            given out, and the next one is begun when it is set, or when it is waited for.
    """
    pending: deque[Future[T | None]] = deque()
    begin = quiet or threading.Event()
    begin.set()

    def make() -> T | None:
        begin.wait()
        return next(source, None)

    with closing(source), ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        try:
            for _ in range(depth):
                pending.append(pool.submit(make))
            while True:
                if quiet is not None:
                    quiet.clear()
                pending.append(pool.submit(make))
                if not pending[0].done():
                    begin.set()
                item = pending.popleft().result()
                if item is None:
                    return
                yield item
        finally:
            begin.set()
            for future in pending:
                future.cancel()
