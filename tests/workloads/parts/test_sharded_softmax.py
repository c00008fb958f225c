"""The softmax over rows of all ranks: golden numbers of the card of arXiv 2102.04848, and 1, 2 and 5 ranks alike."""

from __future__ import annotations

import gc
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.parallel import Spread
from workloads.parts import optimizers, sharded_softmax
from workloads.parts.lars_lamb import own_parts
from workloads.parts.sharded_softmax import RowsOverRanks, instance_cross_entropy, targets
from workloads.ranks import Ranks
from workloads.spec_training import Engine, Optimizer

WORLDS = (5, 2)
N, D, B = 13, 4, 10  # rows: 3, 3, 3, 3 and 1 on five ranks, 7 and 6 on two


def sines(*shape: int, k: float = 1.0) -> Tensor:
    """The card's recipe: sin(k), sin(2 k), ... row by row."""
    return (k * torch.arange(1, math.prod(shape) + 1).double()).sin().view(shape)


def table_of(rows: Tensor) -> RowsOverRanks:
    """A table with these rows, or the part of them that this rank has."""
    table = RowsOverRanks(*rows.shape).double()
    with torch.no_grad():
        table.weight.copy_(rows[table.first : table.first + table.held])
    return table


def dense(x: Tensor, index: Tensor, rows: Tensor, tau: float, alpha: float, k: int) -> tuple[Tensor, Tensor]:
    """Loss of each sample and its targets [B, N], as the card writes them."""
    w = F.normalize(rows, dim=1)
    nearest = (w @ w.T).fill_diagonal_(-torch.inf).topk(k).indices
    y = torch.zeros(len(x), len(w), dtype=x.dtype).scatter_(1, nearest[index], alpha / max(k, 1))
    y.scatter_(1, index[:, None], 1 - alpha if k else 1.0)
    return -(y * (F.normalize(x, dim=1) @ w.T / tau).log_softmax(dim=1)).sum(dim=1), y


@pytest.mark.parametrize(("alpha", "k", "expected"), [(0.0, 0, 2.034055046), (0.2, 2, 2.241131331)])
def test_golden(alpha: float, k: int, expected: float) -> None:
    x, index = sines(2, 3, k=1.9), torch.tensor([0, 3])
    loss, _ = instance_cross_entropy(x, index, table_of(sines(5, 3)), 0.15, alpha=alpha, hardest=k)
    assert loss.mean().item() == pytest.approx(expected, abs=1e-8)


def test_neighbours_golden() -> None:
    table = table_of(sines(5, 3))
    place, y = targets(F.normalize(table.weight.detach(), dim=1), torch.arange(5), table, 0.2, 2)
    assert place[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert place[:, 1:].tolist() == [[2, 4], [3, 4], [4, 0], [1, 0], [2, 0]]
    assert y.tolist() == [pytest.approx([0.8, 0.1, 0.1])] * 5


@pytest.mark.parametrize("k", [1, 5, 12])
def test_it_is_the_dense_softmax_with_targets_that_sum_to_one(k: int) -> None:
    x, rows, index = sines(B, D, k=1.9), sines(N, D), torch.arange(B) % 7
    expected, y = dense(x, index, rows, 0.15, 0.2, k)
    assert torch.allclose(y.sum(dim=1), torch.ones(B).double())
    table = table_of(rows)
    loss, right = instance_cross_entropy(x, index, table, 0.15, alpha=0.2, hardest=k)
    assert torch.allclose(loss, expected, atol=1e-12)
    assert torch.equal(right, (F.normalize(x, dim=1) @ F.normalize(rows, dim=1).T).argmax(dim=1) == index)
    place, shares = targets(F.normalize(rows, dim=1), index, table, 0.2, k)
    assert torch.allclose(torch.zeros_like(y).scatter_add_(1, place, shares), y, atol=1e-12)


def test_without_neighbours_it_is_cross_entropy() -> None:
    x, rows, index = sines(B, D, k=1.9), sines(N, D), torch.arange(B)
    expected = F.cross_entropy(F.normalize(x, dim=1) @ F.normalize(rows, dim=1).T / 0.15, index, reduction="none")
    for alpha, k in ((0.0, 3), (0.2, 0)):
        loss, _ = instance_cross_entropy(x, index, table_of(rows), 0.15, alpha=alpha, hardest=k)
        assert torch.allclose(loss, expected, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_equal_rows_are_a_guess_among_all(alpha: float) -> None:
    """Where all rows are as near, all may be neighbours: their shares still sum to alpha."""
    table = table_of(sines(1, D).repeat(N, 1))
    loss, _ = instance_cross_entropy(sines(B, D, k=1.9), torch.arange(B), table, 0.15, alpha=alpha, hardest=3)
    assert loss.tolist() == pytest.approx([math.log(N)] * B, abs=1e-9)


def test_lengths_mean_nothing_and_gradients_turn_rows() -> None:
    table, x = table_of(sines(N, D)), sines(B, D, k=1.9).requires_grad_()
    loss, _ = instance_cross_entropy(x, torch.arange(B), table, 0.15, alpha=0.2, hardest=3)
    loss.mean().backward()
    assert table.weight.grad is not None and x.grad is not None
    for value, gradient in ((table.weight, table.weight.grad), (x, x.grad)):
        assert gradient.norm(dim=1).min() > 1e-6
        assert (value * gradient).sum(dim=1).abs().max() < 1e-12
    longer, _ = instance_cross_entropy(3 * x, torch.arange(B), table_of(7 * sines(N, D)), 0.15, alpha=0.2, hardest=3)
    assert torch.allclose(longer, loss, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 4, 12])
def test_blocks_of_rows_give_the_same(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (sharded_softmax.LOGITS, columns * B):
        monkeypatch.setattr(sharded_softmax, "LOGITS", most)
        table, x = table_of(sines(N, D)), sines(B, D, k=1.9).requires_grad_()
        loss, right = instance_cross_entropy(x, torch.arange(B), table, 0.15, alpha=0.2, hardest=3)
        loss.mean().backward()
        found.append((loss, x.grad, table.weight.grad, right))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*(each[:3] for each in found), strict=True))  # type: ignore[arg-type]
    assert torch.equal(found[0][3], found[1][3])


def test_half_precision_around_it_changes_nothing() -> None:
    table, x = RowsOverRanks(N, D), sines(B, D, k=1.9).float()
    plain, _ = instance_cross_entropy(x, torch.arange(B), table, 0.15)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = instance_cross_entropy(x, torch.arange(B), table, 0.15)
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)


def test_a_table_is_drawn_alike_in_any_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_softmax, "DRAWN", 4)
    whole = torch.empty(N, D)
    sharded_softmax._draw(whole, 0, 7)
    assert torch.allclose(whole.norm(dim=1), torch.ones(N)) and len(whole.unique(dim=0)) == N
    for first, last in ((0, 3), (3, 13), (4, 8), (5, 6), (12, 13)):
        part = torch.empty(last - first, D)
        sharded_softmax._draw(part, first, 7)
        assert torch.equal(part, whole[first:last])


class Toy(nn.Module):
    """A network that all ranks have, and a table that none has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, D).double()
        with torch.no_grad():
            self.net.weight.copy_(sines(D, D, k=0.7))
            self.net.bias.copy_(sines(D, k=0.3))
        self.table = table_of(sines(N, D))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        loss, _ = instance_cross_entropy(self.net(x), index, self.table, 0.15, alpha=0.2, hardest=3)
        return loss.mean()


def results(rank: int, world: int) -> dict[str, Tensor]:
    """What a rank sees: of its own rows and samples, and of what is the same on all."""
    torch.manual_seed(0)
    found = {"drawn": RowsOverRanks(N, D).weight.detach()}
    x, index = (value.chunk(world)[rank] for value in (sines(B, D, k=1.9), torch.arange(B) * 5 % N))
    table, x = table_of(sines(N, D)), x.clone().requires_grad_()
    loss, right = instance_cross_entropy(x, index, table, 0.15, alpha=0.2, hardest=3)
    loss.mean().backward()
    assert x.grad is not None and table.weight.grad is not None
    found |= {"loss": loss.detach(), "right": right, "dx": x.grad / world, "dw": table.weight.grad}
    table.write(torch.tensor([0, 12, 5]), sines(3, D, k=2.3))
    found["written"] = table.weight.detach()

    toy, ranks = Toy(), Ranks(rank, world)
    spread = Spread(toy, Engine(strategy="ddp"), ranks)
    assert (spread.in_parts, spread.sharded) == (world > 1, False)
    rule = Optimizer(name="sgd", lr=0.1, weight_decay=1e-4)
    optimizer = optimizers.build([{"params": [*toy.net.parameters()]}, {"params": [toy.table.weight]}], rule)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    for last in (False, True):  # two micro-batches: gradients of rows add up, those of the network are averaged once
        with spread.averaging(last):
            (spread(x.detach(), index) / 2).backward()
    parameters = [*toy.net.parameters(), toy.table.weight]
    gradients = [p.grad for p in parameters if p.grad is not None]
    found["norm"] = spread.norm(gradients)
    spread.clip_each(gradients, 0.01)
    found["clipped"] = torch.stack([spread.norm([gradient]) for gradient in gradients])
    optimizer.step()
    net_gradient, rows_gradient = own_parts([toy.net.weight.grad, toy.table.weight.grad])  # type: ignore[list-item]
    found |= {"dnet": net_gradient, "drows": rows_gradient}
    kept = [toy.table.weight, toy.table.weight.grad, optimizer.state[toy.table.weight]["momentum_buffer"]]
    found["kept"] = torch.tensor([part.numel() for part in own_parts(kept)])  # type: ignore[arg-type]
    found["rows"] = own_parts([toy.table.weight.detach()])[0].clone()
    assert spread.finite()
    if rank == world - 1:
        own_parts([toy.table.weight.detach()])[0][0, 0] = torch.nan
    assert not spread.finite()
    return found


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank < world:
            store = dist.FileStore(f"{folder}/store-{world}", world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            torch.save(results(rank, world), f"{folder}/{world}-{rank}.pt")
            if world == 5:
                with pytest.raises(ValueError, match="got 6 instances on 5 workers, expected some for each"):
                    RowsOverRanks(6, D)
            gc.collect()  # DDP goes before gloo, see `workloads.ray_train`
            dist.destroy_process_group()


def test_any_number_of_ranks_computes_what_one_does(tmp_path: Path) -> None:
    # torch is imported once for all: five times is most of a minute
    multiprocessing.set_forkserver_preload(
        ["torch.distributed.tensor", "workloads.parallel", "workloads.parts.optimizers"]
    )
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=max(WORLDS), start_method="forkserver")
    expected = results(0, 1)
    assert expected["kept"].tolist() == [N * D] * 3 and expected["norm"] > 0.1
    for world in WORLDS:
        ranks = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
        for name in ("loss", "right", "norm", "clipped", "dnet"):  # the same on all
            for got in ranks:
                assert torch.allclose(got[name].double(), expected[name].double(), atol=1e-6), (world, name)
        for name in ("drawn", "dx", "dw", "written", "drows", "rows"):  # a part on each
            together = torch.cat([got[name] for got in ranks])
            assert torch.allclose(together, expected[name], atol=1e-6), (world, name)
        most = -(-N // world) * D
        assert [got["kept"].max().item() <= most for got in ranks] == [True] * world
        assert torch.stack([got["kept"] for got in ranks]).sum(dim=0).tolist() == [N * D] * 3
