"""A queue of keys."""

from __future__ import annotations

import pytest
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


def test_tags_travel_with_their_keys() -> None:
    queue = Queue(4, 2, tags=("label", "index"))
    assert queue.tags["label"].tolist() == queue.tags["index"].tolist() == [-1] * 4
    for start in (0, 3):
        queue.put(keys(3, start), label=torch.arange(start, start + 3) % 2, index=torch.arange(start, start + 3))
        queue.turn()
    assert queue.rows[:, 0].tolist() == queue.tags["index"].tolist() == [4, 5, 2, 3]
    assert queue.tags["label"].tolist() == [0, 1, 0, 1]
    assert set(queue.state_dict()) == {"rows", "place", "tag_label", "tag_index"}


def test_keys_without_their_tags_are_refused() -> None:
    with pytest.raises(AssertionError, match="in this order"):
        Queue(4, 2, tags=("label", "index")).put(keys(1), index=torch.zeros(1), label=torch.zeros(1))


def test_only_training_fills_it() -> None:
    queue = Queue(3, 2).eval()
    before = queue.rows.clone()
    queue.put(keys(2))
    queue.turn()
    assert torch.equal(queue.rows, before) and queue.place == 0
