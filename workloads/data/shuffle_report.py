"""How near the order of an epoch comes to a uniform shuffle, in numbers that a person can judge a window by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from workloads.data.columns import Manifest
from workloads.data.order import WINDOW, Rows, Uniform, permutation

MAX_BATCHES = 2000


@dataclass(frozen=True)
class Mixing:
    """Each figure of the order, and beside it the same figure of a uniform shuffle of the same samples.

    Attributes:
        window: about how many samples are mixed one by one.
        position_correlation: between the place in the set and the place in the epoch, -1..1.
        neighbours_share: share of the samples of a batch whose next one in the set's order is at most 100 places away.
        classes_in_batch: mean number of classes in a batch; None without labels.
        run_length: mean number of samples of one class in a row; None without labels.
        uniform: the same figures of a uniform shuffle.
    """

    window: int
    position_correlation: float
    neighbours_share: float
    classes_in_batch: float | None
    run_length: float | None
    uniform: dict[str, float | None]


def mixing(manifest: Manifest, *, batch_size: int = 256, window: int = WINDOW, seed: int = 0) -> Mixing:
    """Measures the order of the first epoch.

    Args:
        manifest: the samples, in an order that may be sorted by class.
        batch_size: of the batches that are looked at.
        window: as in `Uniform`.
        seed: of both orders.
    """
    n = len(manifest)
    batch_size = min(batch_size, n)
    order = Uniform(n, batch_size, seed=seed, window=window).rows(0, 0, n)
    uniform = permutation(seed, 0, 0, n)
    measured: dict[str, Any] = _figures(order, manifest.label, batch_size)
    return Mixing(window=window, uniform=_figures(uniform, manifest.label, batch_size), **measured)


def _figures(order: Rows, label: Rows, batch_size: int) -> dict[str, float | None]:
    n = len(order)
    batches = [order[i : i + batch_size] for i in range(0, n - batch_size + 1, batch_size)][:MAX_BATCHES]
    near = [np.diff(np.sort(batch)) <= 100 for batch in batches] if batch_size > 1 else []
    figures: dict[str, float | None] = {
        "position_correlation": float(np.corrcoef(np.arange(n), order)[0, 1]) if n > 1 else 0.0,
        "neighbours_share": float(np.mean([hits.mean() for hits in near])) if near else 0.0,
        "classes_in_batch": None,
        "run_length": None,
    }
    if (label >= 0).any():
        seen = label[order]
        figures["classes_in_batch"] = float(np.mean([len(np.unique(label[batch])) for batch in batches]))
        figures["run_length"] = n / (1 + int(np.count_nonzero(np.diff(seen))))
    return figures
