"""Schedules: pure functions of how far a run is, so a resumed run has nothing to restore."""

from __future__ import annotations

import math


def warmup_cosine(t: float, *, warmup: float, total: float, base: float, minimum: float = 0.0) -> float:
    """Linear from 0 to `base` over `warmup`, then half a cosine down to `minimum` at `total`.

    `t`, `warmup` and `total` share a unit (epochs in MAE, fractional within an epoch).
    """
    if t < warmup:
        return base * t / warmup
    share = min(1.0, (t - warmup) / max(total - warmup, 1e-12))
    return minimum + (base - minimum) * 0.5 * (1.0 + math.cos(math.pi * share))
