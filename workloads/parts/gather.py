"""Tensors of all ranks."""

from __future__ import annotations

from typing import Any

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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        rows = len(total) // dist.get_world_size()
        return total[first_row(rows) : first_row(rows) + rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """The same with gradients: what flows back into a row is the sum over all ranks, which all use it.

    So the mean over ranks of their losses has the gradient of the loss of the global batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    rows: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return rows


def first_row(rows: int) -> int:
    """Where the rows of this rank begin in what `gather` returns."""
    return rows * dist.get_rank() if dist.is_initialized() else 0
