"""A memory of the last keys of all ranks, first in, first out (He et al. 2020, arXiv 1911.05722)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.parts.gather import Waiting


class Queue(nn.Module):
    """Equal on all ranks, and part of the checkpoint.

    Keys are put in by `put` for each micro-batch and taken over by `turn` once in a step, in the order of the global
    batch: so it does not matter how that was divided.

    Attributes:
        rows: [size, D], unit vectors; random ones at first.
        place: int64, the oldest row, which is the next to go.
        tags: by name int64 [size], what else is known of each row, such as its label; -1 of the random ones.
    """

    rows: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int, tags: Sequence[str] = ()) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._tags = [f"tag_{name}" for name in tags]
        for name in self._tags:
            self.register_buffer(name, torch.full((size,), -1))
        self._waiting = Waiting()

    @property
    def tags(self) -> dict[str, Tensor]:
        return {name.removeprefix("tag_"): self.get_buffer(name) for name in self._tags}

    def put(self, keys: Tensor, **tags: Tensor) -> None:
        """Keeps keys [B, D] of this rank, unit vectors, and their tags [B] for `turn`."""
        assert list(tags) == list(self.tags), f"got tags {list(tags)}, expected {list(self.tags)} in this order"
        if self.training:
            self._waiting.put(keys.float(), *tags.values())

    @torch.no_grad()
    def turn(self) -> None:
        """The keys of all ranks replace the oldest rows; to be called in `after_step`."""
        columns = [column[-len(self.rows) :] for column in self._waiting.take()]
        if not columns:
            return
        count = len(columns[0])
        where = (self.place + torch.arange(count, device=self.place.device)) % len(self.rows)
        for ours, new in zip([self.rows, *self.tags.values()], columns, strict=True):
            ours[where] = new
        self.place.copy_((self.place + count) % len(self.rows))
