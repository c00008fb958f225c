"""BatchNorm over two ranks is that over their common batch."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.models.encoders import build_encoder
from workloads.parts.batch_norm import GlobalBatchNorm, convert
from workloads.spec import Named

ROWS = (3, 5)  # of the two ranks: shares need not be equal


class Activated(nn.BatchNorm2d):
    """As timm's: what is behind it is a part of it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(channels)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


def norms() -> nn.ModuleDict:
    torch.manual_seed(0)
    modules = nn.ModuleDict(
        {
            "plain": nn.BatchNorm1d(4),
            "images": nn.BatchNorm2d(4, eps=0.1, momentum=0.3),
            "free": nn.BatchNorm1d(4, affine=False),
            "averaged": nn.BatchNorm1d(4, momentum=None),
            "forgetful": nn.BatchNorm1d(4, track_running_stats=False),
            "activated": Activated(4),
        }
    )
    for parameter in modules.parameters():
        nn.init.normal_(parameter)
    return modules


def batches() -> dict[str, tuple[Tensor, Tensor]]:
    """Two batches by name: numbers far from 0, where a variance of one pass would lose its digits."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: (sum(ROWS), 4, 2, 2) if name in ("images", "activated") else (sum(ROWS), 4) for name in norms()}
    return {
        name: tuple(100 + torch.randn(2, *shape, generator=generator))  # type: ignore[misc]
        for name, shape in shapes.items()
    }


def results(modules: nn.Module, rows: slice) -> dict[str, Tensor]:
    """What comes out for some rows, what flows back into them, and what the modules have seen."""
    found: dict[str, Tensor] = {}
    for name, (first, second) in batches().items():
        module = modules.get_submodule(name)
        module(first[rows])
        x = second[rows].clone().requires_grad_()
        y = module(x)
        weight = torch.linspace(-1, 1, second.numel()).view(second.shape)[rows]
        (y * weight).square().sum().backward()
        found |= {f"{name}.y": y.detach(), f"{name}.dx": x.grad}  # type: ignore[dict-item]
        found |= {f"{name}.d{p}": value.grad for p, value in module.named_parameters()}  # type: ignore[misc]
        found |= {f"{name}.{b}": value for b, value in module.named_buffers()}
    return found


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    rows = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    torch.save(results(convert(norms()), rows), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = results(norms(), slice(None))
    assert a.keys() == b.keys() == expected.keys()
    for name, value in expected.items():
        kind = name.split(".")[1]
        if kind in ("y", "dx"):
            got = torch.cat([a[name], b[name]])
        elif kind.startswith("d"):  # a weight of both ranks: DDP sums it up
            got = a[name] + b[name]
        else:
            assert torch.equal(a[name], b[name]), name
            got = a[name]
        assert torch.allclose(got, value, rtol=1e-4, atol=1e-4), (name, got, value)


def test_without_ranks_or_in_eval_it_is_torchs_own() -> None:
    ours, theirs = convert(norms()), norms()
    expected, got = results(theirs, slice(None)), results(ours, slice(None))
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    x = torch.randn(2, 4)
    assert torch.equal(ours.eval()["plain"](x), theirs.eval()["plain"](x))


@pytest.mark.parametrize("training", [True, False])
def test_each_norm_is_replaced_and_keeps_what_it_has(training: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4))).train(training)
    state, parameters = net.state_dict(), list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    net[1][0].weight.requires_grad_(False)
    assert convert(net) is net
    assert [type(module) for module in net[1]] == [GlobalBatchNorm, nn.LayerNorm]
    assert [name for name, _ in net.named_parameters()] == names
    assert all(new is old for new, old in zip(net.parameters(), parameters, strict=True))
    assert not net[1][0].weight.requires_grad and net[1][0].training == training
    assert net.state_dict().keys() == state.keys()
    assert net.state_dict()["1.0.running_mean"].data_ptr() == state["1.0.running_mean"].data_ptr()
    assert isinstance(convert(nn.BatchNorm3d(2)), GlobalBatchNorm)


def test_networks_of_timm_compute_the_same() -> None:
    network = build_encoder(Named(name="mobilenetv3_small_050")).eval()  # most of its BatchNorms have an activation
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = list(network.state_dict())
    with torch.no_grad():
        before = network(images)
        assert torch.equal(convert(network)(images), before)
    assert list(network.state_dict()) == names
