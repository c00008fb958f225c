"""A thread that makes things before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


def ahead(source: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """What a generator yields, made by one thread up to `depth` items ahead of the consumer.

    What the source raises is raised at the item where it happened. Closing this closes the source, in this thread.

    Args:
        source: yields no None.
        depth: items that wait while the consumer works on one.
    """
    pending: deque[Future[T | None]] = deque()
    with closing(source), ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        try:
            for _ in range(depth):
                pending.append(pool.submit(next, source, None))
            while True:
                pending.append(pool.submit(next, source, None))
                item = pending.popleft().result()
                if item is None:
                    return
                yield item
        finally:
            for future in pending:
                future.cancel()
