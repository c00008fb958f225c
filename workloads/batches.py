"""What happens to a batch between reader and method."""

from __future__ import annotations

import torch
from torch import Tensor

from workloads.data.modalities import Views
from workloads.data.transforms.image import finish
from workloads.data.views import View
from workloads.methods.base import Batch


def to_device(batch: Batch, views: Views, device: torch.device, *, channels_last: bool = False) -> Batch:
    """Moves a batch; images arrive as bytes and leave as normalised floats, their colours changed.

    Args:
        batch: of a reader.
        views: of the method.
        device: where to.
        channels_last: memory format of the images.
    """
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    for name, view in views.items():
        if isinstance(view, View):
            moved[name] = finish(moved[name], view, batch["key"], name)
            if channels_last:
                moved[name] = moved[name].contiguous(memory_format=torch.channels_last)
    return moved


def micro_batches(batch: Batch, n: int) -> list[Batch]:
    """The batch in n equal parts, in its order."""
    size = len(batch["index"]) // n
    return [{name: value[i * size : (i + 1) * size] for name, value in batch.items()} for i in range(n)]
