"""Tensors of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in their order, [B, ...] -> [world * B, ...], without gradients: the rows of the global batch.

    Every rank must call it, with the same B.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x.detach()
    x = x.contiguous()  # memory in another order, as of images, cannot be sent
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def _summed(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def over_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks; what flows back into each addend is the sum of the gradients of all ranks.

    Every rank must call it, with the same shape; where there are no ranks it is `x` itself.
    """
    if not dist.is_initialized():
        return x
    total: Tensor = _OverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


def gather_with_gradient(x: Tensor) -> Tensor:
    """`gather` with gradients: what flows back into a row is the sum over all ranks, which all use it.

    So the mean over ranks of their losses has the gradient of the loss of the global batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    after = (dist.get_world_size() - dist.get_rank() - 1) * len(x)
    return over_ranks(F.pad(x, (0, 0) * (x.ndim - 1) + (first_row(len(x)), after)))  # zeros where others have rows


def first_row(rows: int) -> int:
    """Where the rows of this rank begin in what `gather` returns."""
    return rows * dist.get_rank() if dist.is_initialized() else 0


def shares(weight: Tensor) -> Tensor:
    """Weights [B] of samples of this rank -> shares: the mean over ranks of sums by them is that over the whole batch.

    Divided by the sum here instead, a rank with few samples that count would give each of them too much.
    """
    return weight / gather(weight.sum()[None]).mean().clamp(min=1e-6)


class Waiting:
    """Tensors of the micro-batches of a step, until `after_step` asks for those of the whole batch.

    It is empty between steps, so it is no state.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def put(self, *columns: Tensor) -> None:
        """Keeps columns [B, ...] of a micro-batch of this rank, without gradients."""
        self._parts.append(tuple(column.detach() for column in columns))

    def take(self) -> list[Tensor]:
        """The columns of the batch of all ranks in its order, [world * B, ...] each.

        None where nothing was put, and none where something is not finite: a step that is skipped must leave no trace
        in what methods remember. To see that, the device is waited for.
        """
        columns = [gather(torch.cat(parts)) for parts in zip(*self._parts, strict=True)]
        self._parts.clear()
        return columns if all(column.isfinite().all() for column in columns) else []
