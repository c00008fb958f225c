"""A checkpoint is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from workloads import checkpoint


def trained(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_restore_brings_back_parameters_buffers_and_moments(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    assert checkpoint.latest_step(tmp_path) is None
    checkpoint.save(tmp_path, 3, model, optimizer, keep=2)
    other, other_optimizer = trained(1, seed=1)
    assert checkpoint.restore(tmp_path, other, other_optimizer) == 3
    for (name, got), expected in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
    moments = [other_optimizer.state[p]["exp_avg_sq"] for p in other.parameters()]
    assert all(
        torch.equal(m, optimizer.state[p]["exp_avg_sq"]) for m, p in zip(moments, model.parameters(), strict=True)
    )


def test_keeps_the_newest(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, model, optimizer, keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000010.pt", "step-00000015.pt"]
    assert checkpoint.latest_step(tmp_path) == 15


@pytest.mark.parametrize("broken", ["torch.save", "fsync"])
def test_a_full_disk_leaves_the_previous_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    model, optimizer = trained(1)
    checkpoint.save(tmp_path, 5, model, optimizer, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((torch, "save", full) if broken == "torch.save" else (os, "fsync", full)))
    with pytest.raises(checkpoint.CheckpointError, match="step 10 could not be written"):
        checkpoint.save(tmp_path, 10, model, optimizer, keep=1)
    monkeypatch.undo()
    assert checkpoint.restore(tmp_path, *trained(0)) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000005.pt"]


def test_damage_and_another_model_are_named(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    path = checkpoint.save(tmp_path, 5, model, optimizer, keep=1)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-00000005.pt cannot be restored"):
        checkpoint.restore(tmp_path, nn.Linear(2, 2))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(checkpoint.CheckpointError, match="cannot be restored") as caught:
        checkpoint.restore(tmp_path, model)
    assert "latest" in caught.value.hint


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"step": 1, "method": Bomb()}, tmp_path / "step-00000001.pt")
    (tmp_path / "latest").write_text("step-00000001.pt")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be restored"):
        checkpoint.restore(tmp_path, nn.Linear(2, 2))
    assert not (tmp_path / "owned").exists()
