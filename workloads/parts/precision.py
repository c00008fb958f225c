"""Where half precision would do harm."""

from __future__ import annotations

import contextlib

import torch


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within, autocast leaves float32 alone, which it would multiply in half precision.

    The meta device, where jobs are counted, has no autocast.
    """
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
