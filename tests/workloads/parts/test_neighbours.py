"""The rows that follow in the batch of all ranks."""

from __future__ import annotations

import pytest
import torch

from workloads.parts import neighbours
from workloads.parts.neighbours import following


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "share"), [(1, 4), (2, 4), (3, 3), (2, 2), (4, 1), (5, 2)])
def test_ranks_get_what_one_would(n: int, ranks: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(ranks * share).float()[:, None].expand(-1, 3)
    parts = whole.split(share)
    expected = torch.roll(whole, -n, 0)
    sent = []
    for rank, x in enumerate(parts):

        def gather(first: torch.Tensor) -> torch.Tensor:
            sent.append(len(first))
            return torch.cat([part[:n] for part in parts])

        monkeypatch.setattr(neighbours, "gather", gather)
        monkeypatch.setattr(neighbours, "first_row", lambda rows, rank=rank: rows * rank)
        assert torch.equal(following(x, n), expected[rank * share : (rank + 1) * share])
    assert set(sent) == {min(n, share)}


def test_images_of_any_memory_without_gradients() -> None:
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    found = following(x.to(memory_format=torch.channels_last), 2)
    assert torch.equal(found, x.roll(-2, 0)) and not found.requires_grad


@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_in_which_an_image_would_follow_itself_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"got a batch of {rows} images, expected 3 or more.*raise batch_size"):
        following(torch.zeros(rows, 1), 2)
