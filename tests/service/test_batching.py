import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching import Batcher


def double(items: list[int]) -> list[int]:
    return [2 * item for item in items]


@given(
    requests=st.lists(st.lists(st.integers(), max_size=9), min_size=1, max_size=9),
    max_batch_size=st.integers(1, 7),
)
def test_every_caller_gets_its_own_results_in_order(requests: list[list[int]], max_batch_size: int) -> None:
    sizes: list[int] = []

    def function(items: list[int]) -> list[int]:
        sizes.append(len(items))
        return double(items)

    async def main() -> list[list[int]]:
        batcher = Batcher(function, max_batch_size)
        return await asyncio.gather(*map(batcher, requests))

    assert asyncio.run(main()) == list(map(double, requests))
    assert all(0 < size <= max_batch_size for size in sizes)
    assert sum(sizes) == sum(map(len, requests))


class Gate:
    """A function of lists that says when it was entered and returns when it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.entered.set()
        assert self.opened.wait(10)
        return double(items)


def test_a_lone_item_runs_at_once_and_arrivals_meanwhile_are_one_batch() -> None:
    gate = Gate()

    async def main() -> list[list[int]]:
        batcher = Batcher(gate, 32)
        calls = [asyncio.create_task(batcher([0]))]
        await asyncio.to_thread(gate.entered.wait, 10)
        calls += [asyncio.create_task(batcher([i])) for i in range(1, 6)]
        await asyncio.sleep(0)
        gate.opened.set()
        return await asyncio.gather(*calls)

    assert asyncio.run(main()) == [[2 * i] for i in range(6)]
    assert gate.batches == [[0], [1, 2, 3, 4, 5]]


def test_whoever_goes_away_is_not_computed() -> None:
    gate = Gate()

    async def main() -> list[int]:
        batcher = Batcher(gate, 32)
        first = asyncio.create_task(batcher([0]))
        await asyncio.to_thread(gate.entered.wait, 10)
        gone, stays = asyncio.create_task(batcher([1])), asyncio.create_task(batcher([2]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        await first
        return await stays

    assert asyncio.run(main()) == [4]
    assert gate.batches == [[0], [2]]


@pytest.mark.parametrize("breaks", [lambda _: 1 / 0, lambda items: items[1:]], ids=["raises", "too few results"])
def test_a_batch_that_breaks_fails_its_callers_and_the_next_one_runs(breaks) -> None:
    async def main() -> list[int]:
        functions = iter([breaks, double])
        batcher = Batcher(lambda items: next(functions)(items), 32)
        failures = await asyncio.gather(batcher([1, 2]), batcher([3]), return_exceptions=True)
        assert all(isinstance(failure, (ZeroDivisionError, AssertionError)) for failure in failures)
        return await batcher([4])

    assert asyncio.run(main()) == [8]
