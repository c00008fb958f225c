"""Tensors of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in their order, [B, ...] -> [world * B, ...], without gradients: the rows of the global batch.

    Every rank must call it, with the same B.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def first_row(rows: int) -> int:
    """Where the rows of this rank begin in what `gather` returns."""
    return rows * dist.get_rank() if dist.is_initialized() else 0
