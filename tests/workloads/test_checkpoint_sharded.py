"""Two ranks share out a method; what they wrote is read by two, by one, and by a method that is whole."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from workloads import checkpoint
from workloads.checkpoint import CheckpointError, Checkpoints
from workloads.checkpoint_sharded import read_metadata
from workloads.ranks import Ranks
from workloads.spec_training import CheckpointPolicy

POLICY = CheckpointPolicy(keep=2)


def made(seed: int) -> tuple[nn.Module, AdamW]:
    """Uneven: 5 rows on 2 ranks, a normalisation whose statistics differ by rank, a parameter without gradient."""
    torch.manual_seed(seed)
    method = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    method.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return method, optimizer_of(method)


def optimizer_of(method: nn.Module) -> AdamW:
    named = dict(method.named_parameters())
    groups = [{"params": [p for n, p in named.items() if (p.ndim > 1) is matrix], "lr_scale": 0.5} for matrix in (0, 1)]
    return AdamW(groups, lr=0.1)


def trained(method: nn.Module, optimizer: AdamW, rank: int) -> None:
    for step in range(3):
        torch.manual_seed(2 * step + rank)
        method(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(method: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Weights and moments by name, in full."""
    tensors = dict(method.state_dict())
    for name, parameter in method.named_parameters():
        tensors |= {f"{name}:{key}": value for key, value in optimizer.state[parameter].items()}
    return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for n, v in tensors.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]


def run(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    ranks = Ranks(rank, 2)

    def shared_out(seed: int) -> tuple[nn.Module, AdamW]:
        method, _ = made(seed)
        fully_shard(method[0])
        fully_shard(method)
        return method, optimizer_of(method)

    method, optimizer = shared_out(0)
    with Checkpoints(folder / "parts", POLICY, ranks, sharded=True) as writer:
        assert writer.restore(method, optimizer).step == 0
        trained(method, optimizer, rank)
        for step in (5, 10, 15):
            writer.save(step, method, optimizer, extra={"scale": torch.tensor(3.0), "n": step}, metric=None)
        saved = whole(method, optimizer)
        for parameter in method.parameters():  # the copy is what counts
            parameter.data.zero_()
    if rank == 0:
        torch.save(saved, folder / "expected.pt")
    dist.barrier()

    other, other_optimizer = shared_out(1)
    with Checkpoints(folder / "parts", POLICY, ranks, sharded=True) as reader:
        restored = reader.restore(other, other_optimizer)
    assert (restored.step, restored.extra, restored.notes) == (15, {"scale": torch.tensor(3.0), "n": 15}, [])
    expected = torch.load(folder / "expected.pt", weights_only=True)  # statistics of BatchNorm: those of rank 0
    assert differing(whole(other, other_optimizer), expected) == []
    assert other_optimizer.param_groups[0]["lr_scale"] == 0.5
    trained(other, other_optimizer, rank)  # and what was read can be trained

    single, single_optimizer = made(2)
    if rank == 0:
        trained(single, single_optimizer, 0)
    with Checkpoints(
        folder / "whole", POLICY, ranks
    ) as writer:  # DDP: rank 0 writes, and only it needs to see the file
        writer.save(7, single, single_optimizer, extra={"n": 7}, metric=None)
    dist.barrier()
    seen = folder / ("whole" if rank == 0 else "nothing")
    for method, optimizer in (made(3), shared_out(4)):  # FSDP continues what DDP began
        restored = Checkpoints(seen, POLICY, ranks).restore(method, optimizer)
        assert (restored.step, restored.extra) == (7, {"n": 7})
        got = whole(method, optimizer)
        if rank == 0:
            assert differing(got, whole(single, single_optimizer)) == []
    if rank == 0:
        (folder / "whole" / "step-00000007.pt").write_bytes(b"")
    dist.barrier()
    with pytest.raises(CheckpointError, match="step 7 is damaged"):  # on both: none goes on alone
        Checkpoints(seen, POLICY, ranks).restore(*made(3))

    writer = Checkpoints(folder / "full", POLICY, ranks, sharded=True)
    if rank == 1:
        os.fsync = full  # type: ignore[assignment]
    writer.save(1, *shared_out(0), extra={}, metric=None)
    with pytest.raises(CheckpointError, match=r"step 1 could not be written.*rank 1.*No space left"):
        writer.wait()
    assert checkpoint.latest_step(folder / "full") is None
    dist.destroy_process_group()


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=run, args=(rank, folder)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return folder


def test_two_ranks_write_what_one_process_reads(written: Path) -> None:
    expected = torch.load(written / "expected.pt", weights_only=True)
    method, optimizer = made(5)
    restored = Checkpoints(written / "parts", POLICY, Ranks()).restore(method, optimizer)
    assert (restored.step, restored.extra["n"]) == (15, 15)
    assert differing(whole(method, optimizer), expected) == []
    method, _ = made(6)
    assert checkpoint.restore_weights(written / "parts", method) == 15
    assert all(torch.equal(value, expected[name]) for name, value in method.state_dict().items())
    names = sorted(path.name for path in (written / "parts").iterdir())
    assert names == ["latest", "step-00000010", "step-00000010.json", "step-00000015", "step-00000015.json"]
    with pytest.raises(CheckpointError, match=r"(?s)does not fit.*Missing.*Unexpected"):
        checkpoint.restore_weights(written / "parts", nn.Linear(2, 2))


def test_a_damaged_part_falls_back(written: Path) -> None:
    part = written / "parts" / "step-00000015" / "__1_0.distcp"
    whole_part = part.read_bytes()
    part.write_bytes(whole_part[:-1] + bytes([whole_part[-1] ^ 1]))
    restored = Checkpoints(written / "parts", POLICY, Ranks()).restore(*made(0))
    part.write_bytes(whole_part)
    assert restored.step == 10
    assert [note.text for note in restored.notes] == [
        "checkpoint of step 15 is damaged (the sha256 of step-00000015/__1_0.distcp differs); continued from step 10"
    ]


def test_metadata_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError, match="mkdir does not belong into a checkpoint"):
        read_metadata(tmp_path)
    assert not (tmp_path / "owned").exists()
