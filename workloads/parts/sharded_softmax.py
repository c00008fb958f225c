"""Softmax over millions of classes, each rank with the weights of a part of them (Liu et al. 2021, arXiv 2102.04848).

The batch of all ranks meets the rows of each; what is exchanged are features [B, D] and a few numbers a sample, never
rows or logits. A rank holds n = N / ranks rows: 4 n D bytes, as much for each moment of the optimizer and, within a
step, for the gradient, the rows at unit length, and the gradients of what these are used for. Logits are computed in
blocks; more than one block is computed again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.parts.gather import gather, gather_with_gradient, over_ranks
from workloads.parts.precision import full_precision

DRAWN = 1024  # rows from one seed
LOGITS = 2**28  # of a block: 1 GiB, of which backward needs three at once


class RowsOverRanks(nn.Module):
    """One row [D] for each of N instances, a contiguous part of them on each rank, as `torch.chunk` cuts.

    Random unit rows at first, the same for any number of ranks.

    Attributes:
        count: N.
        first: the first row of this rank.
        held: n, how many it has.
        share: of the ranks, the last of which may hold less.
        weight: the rows of this rank, [n, D]; where they are shared out a DTensor [N, D] of which it holds them.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.count = count
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.share = -(-count // world)
        if self.share * (world - 1) >= count:
            raise ValueError(f"got {count} instances on {world} workers, expected some for each; use fewer workers")
        self.first = rank * self.share
        self.held = min(self.share, count - self.first)
        seed = int(torch.randint(2**62, (), device="cpu"))
        rows = torch.empty(self.held, dim)
        if not rows.is_meta:
            _draw(rows, self.first, seed)
        self.weight = nn.Parameter(rows)

    def share_out(self, device: torch.device) -> None:
        """Says to torch that the rows here are a part, so that any number of ranks can read a checkpoint of them."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        part, mesh = self.weight.detach(), init_device_mesh(device.type, (dist.get_world_size(),))
        shape, stride = torch.Size((self.count, part.shape[1])), (part.shape[1], 1)
        whole = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        self.weight = nn.Parameter(whole)

    def own(self) -> Tensor:
        """The rows of this rank, [n, D].

        All ranks have the same loss, and `over_ranks` adds up what flows back from each: the gradient is divided by
        their number here, since nobody averages it.
        """
        weight: Tensor = self.weight
        part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight.view_as(weight)
        if part.requires_grad and dist.is_initialized():
            world = dist.get_world_size()
            part.register_hook(lambda gradient: gradient / world)
        return part

    def place(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Instances [B] -> where their rows are among those of this rank, and whether they are there at all."""
        place = index - self.first
        return place.clamp(0, self.held - 1), (place >= 0) & (place < self.held)

    @torch.no_grad()
    def write(self, index: Tensor, rows: Tensor) -> None:
        """Replaces the rows of `index` [B] by `rows` [B, D], those that this rank has."""
        place, here = self.place(index)
        self.own()[place[here]] = rows[here].to(self.weight.dtype)


def _draw(rows: Tensor, first: int, seed: int) -> None:
    """Fills `rows`, which begin with row `first` of a table that is drawn block by block."""
    for block in range(first // DRAWN, -(-(first + len(rows)) // DRAWN)):
        generator = torch.Generator(device="cpu").manual_seed(seed + block)
        drawn = F.normalize(torch.randn(DRAWN, rows.shape[1], generator=generator, device="cpu"), dim=1)
        begin = block * DRAWN - first
        part = rows[max(begin, 0) : begin + DRAWN]
        part.copy_(drawn[max(-begin, 0) :][: len(part)])


def instance_cross_entropy(
    x: Tensor, index: Tensor, table: RowsOverRanks, temperature: float, *, alpha: float = 0.0, hardest: int = 0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of features against all rows by their cosine over tau; own row right, its neighbours a little.

    Every rank must call it, with the same B. The gradient of `x` is to be averaged over ranks, as DDP does.

    Args:
        x: [B, D] of this rank.
        index: int64 [B], whose features they are.
        table: of N rows.
        temperature: tau.
        alpha: share of the target that goes to the neighbours.
        hardest: K, the rows j != i with the largest cos(w_i, w_j), alpha / K each; at most N - 1. A tie in the last
            place counts whole.

    Returns:
        The loss of each sample of the batch of all ranks, [world * B], and bool of the same shape: whether its own
        row is the most like it. Both are the same on all ranks.
    """
    with full_precision(x.device):
        every, index = gather_with_gradient(F.normalize(x, dim=1)), gather(index)
        w = F.normalize(table.own(), dim=1)
        place, y = targets(w.detach(), index, table, alpha, min(hardest, table.count - 1))
        wanted = F.embedding_bag(place, w, per_sample_weights=y, mode="sum")  # [B, D]: y_j w_j summed up
        target = over_ranks((every * wanted).sum(dim=1)) / temperature
        log_sum, nearest = _over_all_rows(every / temperature, w, table.first)
    return log_sum - target, nearest == index


@torch.no_grad()
def targets(w: Tensor, index: Tensor, table: RowsOverRanks, alpha: float, hardest: int) -> tuple[Tensor, Tensor]:
    """What each sample of the batch of all ranks should be like, among the rows of this rank.

    Args:
        w: [n, D], those rows at unit length.
        index: int64 [B], of the batch of all ranks.
        table: that they are of.
        alpha: as for `instance_cross_entropy`.
        hardest: K < N.

    Returns:
        Places in `w` int64 [B, 1 + K], and their shares y [B, 1 + K]: 0 where a row is not wanted or not here. Over
        all ranks the shares of a sample sum to 1.
    """
    place, here = table.place(index)
    own, y = place[:, None], here[:, None].to(w.dtype)
    if alpha == 0 or hardest == 0:
        return own, y
    rows = over_ranks(w[place] * y)  # [B, D], w_i
    best, where = w.new_full((len(index), hardest), -torch.inf), index.new_zeros(len(index), hardest)
    for start in range(0, len(w), _columns(rows)):
        part = w[start : start + _columns(rows)]
        cos = rows @ part.T
        columns = torch.arange(start, start + len(part), device=w.device)
        cos.masked_fill_(columns + table.first == index[:, None], -torch.inf)
        found = cos.topk(min(hardest, len(part)))
        best, order = torch.cat([best, found.values], dim=1).topk(hardest)
        where = torch.cat([where, found.indices + start], dim=1).gather(1, order)
    least = gather(best.T.contiguous()).topk(hardest, dim=0).values[-1]  # the K-th largest of all ranks
    chosen = (best >= least[:, None]).to(w.dtype)
    share = alpha / over_ranks(chosen.sum(dim=1))
    return torch.cat([own, where], dim=1), torch.cat([(1 - alpha) * y, share[:, None] * chosen], dim=1)


def _columns(x: Tensor) -> int:
    return max(1, LOGITS // len(x))


def _block(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = x @ w.T
    best, place = logits.detach().max(dim=1)
    return logits.logsumexp(dim=1), best, place


def _over_all_rows(x: Tensor, w: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Logsumexp of x w_j over the rows j of all ranks, [B], and the row with the largest, int64 [B]."""
    parts = w.split(_columns(x))
    block: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = _block
    if len(parts) > 1:
        from torch.utils.checkpoint import checkpoint

        block = partial(checkpoint, _block, use_reentrant=False, preserve_rng_state=False)
    found = [block(x, part) for part in parts]
    log_sum = torch.stack([each[0] for each in found]).logsumexp(dim=0)
    largest = gather(log_sum[None]).amax(dim=0)
    total = over_ranks((log_sum - largest).exp())

    best, which = torch.stack([each[1] for each in found]).max(dim=0)  # [B]
    place = torch.stack([each[2] for each in found]).gather(0, which[None])[0]
    row = first + place + which * _columns(x)
    rank = gather(best[None]).argmax(dim=0)
    return largest + total.log(), gather(row[None]).gather(0, rank[None])[0]
