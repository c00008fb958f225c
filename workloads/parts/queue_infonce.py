"""The contrastive loss against a queue (He et al. 2020, arXiv 1911.05722), without its table of logits.

Of 49 places of 256 images and a queue of 65,536 keys the logits are 3.3 GB, and autograd would keep them twice. They
are made tile by tile instead, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135): what the loss needs of them is
the log of a sum, and the gradient of that is the mean of the keys by their shares in it, which is found on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.parts.precision import full_precision

# Queries and keys of a tile of logits: 1 MiB, for the cache of a core, and 256 MiB.
CACHED, LARGE = (256, 1024), (8192, 8192)


def queue_info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query against its own key, which is right, and all keys of a queue.

    Args:
        queries: [N, D], of unit length, as all rows here.
        keys: [N, D]; neither they nor the queue get gradients.
        queue: [K, D].
        temperature: tau.

    Returns:
        [N] in float32, not scaled by tau; and bool [N], whether no key of the queue is nearer than the own one.
    """
    q = queries.float()
    own = (q * keys.detach().float()).sum(dim=1) / temperature
    with full_precision(q.device):
        others, nearest = OverQueue.apply(q, queue.detach(), temperature)  # type: ignore[no-untyped-call]
    return F.softplus(others - own), own.detach() >= nearest


class OverQueue(torch.autograd.Function):
    """log sum_j exp(<q, k_j> / tau) over the keys of a queue, and the largest of these logits: [N] each."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        rows, columns = CACHED if q.device.type == "cpu" else LARGE
        found = [_over_queue(part / temperature, queue, columns) for part in q.split(rows)]
        others, nearest, mean = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(mean / temperature)
        ctx.mark_non_differentiable(nearest)
        return others[:, 0], nearest[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0][:, None] * slope, None, None


def _over_queue(q: Tensor, queue: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of q / tau [n, D], as columns [n, 1]; and the mean of the keys by their shares, [n, D]."""
    nearest, total, mean = q.new_full((len(q), 1), -torch.inf), q.new_zeros(len(q), 1), torch.zeros_like(q)
    for part in queue.split(columns):
        logits = _product(q, part)
        before, nearest = nearest, torch.maximum(nearest, logits.amax(dim=1, keepdim=True))
        shares, shrunk = logits.sub_(nearest).exp_(), (before - nearest).exp()
        total = total * shrunk + shares.sum(dim=1, keepdim=True)
        mean = mean * shrunk + _product(shares, part.T)
    return nearest + total.log(), nearest, mean / total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[n, d] and [k, d] -> a b^T [n, k]; on a CPU by oneDNN: `@` takes MKL, half as fast on AMD."""
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # F.linear would copy both
        return product
    return a @ b.T
