"""Batches without waiting: whatever came in while the last batch was computed is the next one.

`serve.batch` waits a fixed time for company: at one client that time is pure delay, and
without it arrivals during a long forward become batches of one. Here a lone item runs at
once, and the batches grow with the load by themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs a function of lists for callers who have an item or a few, one batch at a time, first come first served."""

    def __init__(self, function: Callable[[list[Item]], Sequence[Result]], max_batch_size: int) -> None:
        """Keeps the arguments.

        Args:
            function: blocking, one result for each item; it runs in a thread.
            max_batch_size: most items it gets at a time.
        """
        self._function = function
        self._max_batch_size = max_batch_size
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Results in the order of the items, which may meet others in a batch and may be split over several.

        Raises:
            Exception: what the function raised for a batch with one of the items.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await asyncio.gather(*futures)

    async def _work(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch_size))]
            batch = [(item, future) for item, future in batch if not future.cancelled()]  # whose client went away
            if not batch:
                continue
            try:
                results = await asyncio.to_thread(self._function, [item for item, _ in batch])
                assert len(results) == len(batch), f"{len(results)} results for {len(batch)} items"
            except Exception as error:  # the callers' to handle: the next batch must run
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
