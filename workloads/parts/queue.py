"""A memory of the last keys of all ranks, first in, first out (He et al. 2020, arXiv 1911.05722)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.parts.gather import gather


class Queue(nn.Module):
    """Equal on all ranks, and part of the checkpoint.

    Keys are put in by `put` for each micro-batch and taken over by `turn` once in a step, in the order of the global
    batch: so it does not matter how that was divided.

    Attributes:
        rows: [size, D], unit vectors; random ones at first.
        place: int64, the oldest row, which is the next to go.
    """

    rows: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._waiting: list[Tensor] = []

    def put(self, keys: Tensor) -> None:
        """Keeps keys [B, D] of this rank, unit vectors, for `turn`."""
        if self.training:
            self._waiting.append(keys.detach().float())

    @torch.no_grad()
    def turn(self) -> None:
        """The keys of all ranks replace the oldest rows; to be called in `after_step`."""
        if not self._waiting:
            return
        keys = gather(torch.cat(self._waiting))[-len(self.rows) :]
        self._waiting.clear()
        where = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.rows)
        self.rows[where] = keys
        self.place.copy_((self.place + len(keys)) % len(self.rows))
