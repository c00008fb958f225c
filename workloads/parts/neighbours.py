"""Other images of the batch, for methods that mix unrelated ones: which they are does not depend on the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from workloads.parts.gather import first_row, gather


@torch.no_grad()
def following(x: Tensor, n: int) -> Tensor:
    """For each row of this rank the one n later in the batch of all ranks, which begins again behind its end.

    Samples are shuffled, so these are of unrelated images. Ranks exchange no more than their first n rows, and no
    gradients.

    Args:
        x: [B, ...].
        n: 1 or more.

    Raises:
        ValueError: the batch has no more than n rows, so that some would be their own neighbours.
    """
    first = x[:n]
    of_all = gather(first)
    ranks = len(of_all) // len(first)
    if len(x) * ranks <= n:
        raise ValueError(
            f"got a batch of {len(x) * ranks} images, expected {n + 1} or more, of which each is mixed with others; "
            "raise batch_size or micro_batch_size"
        )
    of_later = of_all.roll(-first_row(len(first)) - len(first), dims=0)  # the next rank's first
    return torch.cat([x, of_later])[n : n + len(x)]
