"""The slow copy of a network (Polyak averaging): a teacher that follows its student."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def copy_of(module: M) -> M:
    """An equal network that no optimizer trains; it stays in the module tree, hence in checkpoints."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Slow <- momentum * slow + (1 - momentum) * fast, over parameters; to be called in `after_step`.

    Buffers are left alone: BatchNorm keeps the statistics of what went through it.
    """
    pairs = zip(slow.parameters(), fast.parameters(), strict=True)
    for ours, theirs in pairs:
        ours.lerp_(theirs.detach().to(ours.dtype), 1 - momentum)
