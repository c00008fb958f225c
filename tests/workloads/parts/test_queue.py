"""A queue of keys."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workloads.parts.queue import Queue


def keys(n: int, start: int = 0) -> Tensor:
    """Rows that say their number."""
    return torch.arange(start, start + n).float()[:, None].expand(n, 2).clone()


def test_it_begins_with_unit_vectors_and_its_state_is_all_buffers() -> None:
    queue = Queue(5, 3)
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(5))
    assert set(queue.state_dict()) == {"rows", "place"} and not list(queue.parameters())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), max_size=6))
def test_it_holds_the_newest_keys_however_they_came(size: int, steps: list[list[int]]) -> None:
    torch.manual_seed(0)
    queue, model = Queue(size, 2), []
    model = [row.tolist() for row in queue.rows]  # the oldest first
    n = 0
    for micro_batches in steps:
        before = queue.rows.clone()
        for rows in micro_batches:
            queue.put(keys(rows, n))
            model += keys(rows, n).tolist()
            n += rows
        assert torch.equal(queue.rows, before)  # the next micro-batch of the step sees what the first one saw
        queue.turn()
        model = model[-size:]
        place = int(queue.place)
        assert torch.cat([queue.rows[place:], queue.rows[:place]]).tolist() == model


def test_only_training_fills_it() -> None:
    queue = Queue(3, 2).eval()
    before = queue.rows.clone()
    queue.put(keys(2))
    queue.turn()
    assert torch.equal(queue.rows, before) and queue.place == 0
