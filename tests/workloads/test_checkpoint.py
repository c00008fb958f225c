"""A checkpoint is whole or not there, and training does not wait for it."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from workloads import checkpoint
from workloads.checkpoint import CheckpointError, Checkpoints
from workloads.checkpoint_state import Buffers
from workloads.ranks import Ranks
from workloads.spec_training import CheckpointPolicy


def trained(steps: int, seed: int = 0, width: int = 3) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def checkpoints(folder: Path, **policy: Any) -> Checkpoints:
    return Checkpoints(folder, CheckpointPolicy(**policy), Ranks())


def saved(folder: Path, *steps: int, metric: float | None = None, **policy: Any) -> tuple[nn.Module, Optimizer]:
    model, optimizer = trained(2)
    with checkpoints(folder, **policy) as writer:
        for step in steps:
            writer.save(step, model, optimizer, extra={}, metric=metric)
    return model, optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_restore_brings_back_parameters_buffers_moments_and_extra(tmp_path: Path) -> None:
    assert checkpoint.latest_step(tmp_path) is None
    assert checkpoints(tmp_path).restore(*trained(0)) == checkpoint.Restored()
    model, optimizer = trained(3)
    extra = {"scale": torch.tensor(2.0), "count": 7, "names": ["a", ("b", 1.5)]}
    with checkpoints(tmp_path) as writer:
        writer.save(3, model, optimizer, extra=extra, metric=None)
    other, other_optimizer = trained(1, seed=1)
    restored = checkpoints(tmp_path).restore(other, other_optimizer)
    assert restored == checkpoint.Restored(3, extra, [])
    for (name, got), expected in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(value, optimizer.state[p][key]) for key, value in other_optimizer.state[q].items())
    assert torch.load(tmp_path / "step-00000003.pt", weights_only=True)["method"].keys() == model.state_dict().keys()


def test_training_goes_on_while_the_state_of_the_call_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(1)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    may_write, write = threading.Event(), torch.save

    def slow(*arguments: Any) -> None:
        assert may_write.wait(10)
        write(*arguments)

    monkeypatch.setattr(torch, "save", slow)
    with checkpoints(tmp_path) as writer:
        writer.save(5, model, optimizer, extra={}, metric=None)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert checkpoint.latest_step(tmp_path) is None
        may_write.set()
        writer.wait()
        assert checkpoint.latest_step(tmp_path) == 5
    other, _ = trained(0)
    assert checkpoint.restore_weights(tmp_path, other) == 5
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_copies_use_their_memory_again() -> None:
    buffers, state = Buffers(), {"a": torch.ones(3), "b": [torch.zeros(2, 2), 5]}
    first = buffers.copy(state)
    state["a"].add_(1)
    second = buffers.copy(state)
    assert second["a"].tolist() == [2, 2, 2] and second["b"][1] == 5
    assert first["a"].data_ptr() == second["a"].data_ptr() != state["a"].data_ptr()
    assert buffers.copy({"a": torch.ones(4)})["a"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("broken", ["torch.save", "fsync"])
def test_a_full_disk_leaves_the_previous_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    model, optimizer = saved(tmp_path, 5, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(*((torch, "save", full) if broken == "torch.save" else (os, "fsync", full)))
    writer.save(10, model, optimizer, extra={}, metric=None)
    with pytest.raises(CheckpointError, match=r"step 10 could not be written.*No space left") as caught:
        writer.save(15, model, optimizer, extra={}, metric=None)
    monkeypatch.undo()
    assert "free disk space" in caught.value.hint
    writer.close()
    assert names(tmp_path) == ["latest", "step-00000005.json", "step-00000005.pt"]
    assert checkpoints(tmp_path).restore(*trained(0)).step == 5


def test_a_failure_is_told_once_by_whoever_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    model, optimizer = trained(0)
    with pytest.raises(CheckpointError), checkpoints(tmp_path / "file") as writer:
        writer.save(1, model, optimizer, extra={}, metric=None)
    with pytest.raises(KeyError, match="of the loop"), checkpoints(tmp_path / "file") as writer:
        writer.save(1, model, optimizer, extra={}, metric=None)
        raise KeyError("of the loop")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_the_seal(path: Path) -> None:
    path.with_suffix(".json").unlink()


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (cut, r"step-00000010.pt has 100 of \d+ bytes"),
        (flip, "the sha256 of step-00000010.pt differs"),
        (Path.unlink, "step-00000010.pt is missing"),
        (lose_the_seal, "step-00000010.json is missing or damaged"),
    ],
)
def test_damage_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, harm: Callable[[Path], None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 5, 10)
    harm(tmp_path / "step-00000010.pt")
    restored = checkpoints(tmp_path).restore(*trained(0))
    assert restored.step == 5
    ((_, note),) = restored.notes
    assert note.startswith("checkpoint of step 10 is damaged (") and note.endswith("; continued from step 5")
    assert re.search(why, note)
    assert checkpoint.restore_weights(tmp_path, trained(0)[0]) == 5
    assert note in caplog.text
    cut(tmp_path / "step-00000005.pt")
    with pytest.raises(CheckpointError, match=r"step 10 is damaged.*step 5 is damaged") as caught:
        checkpoints(tmp_path).restore(*trained(0))
    assert "start anew" in caught.value.hint


def test_a_run_whose_checkpoints_were_removed_does_not_start_anew(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    for path in tmp_path.glob("step-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="`latest` names step 5, of which nothing is left") as caught:
        checkpoints(tmp_path).restore(*trained(0))
    assert f"remove {tmp_path} to start anew" in caught.value.hint


def test_another_model_or_optimizer_is_no_damage(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, 5, 10)
    with pytest.raises(CheckpointError, match=r"(?s)step 10.*does not fit.*Missing.*weight.*Unexpected.*0.bias"):
        checkpoints(tmp_path).restore(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"size mismatch for 0.weight"):
        checkpoint.restore_weights(tmp_path, trained(0, width=5)[0])
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoints(tmp_path).restore(model, torch.optim.AdamW(model[:1].parameters()))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    model, optimizer = trained(0)
    with checkpoints(tmp_path) as writer:
        writer.save(1, model, optimizer, extra={"bomb": Bomb()}, metric=None)
    with pytest.raises(CheckpointError, match="step 1 is damaged"):
        checkpoints(tmp_path).restore(nn.Linear(2, 2))
    assert not (tmp_path / "owned").exists()


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    with checkpoints(tmp_path, keep=2, keep_best=1) as writer:
        for step, metric in ((1, None), (2, 0.5), (3, 0.1), (4, float("nan")), (5, 0.7), (6, None)):
            writer.save(step, model, optimizer, extra={}, metric=metric)
    assert [path.name for path in sorted(tmp_path.glob("*.pt"))] == [f"step-0000000{i}.pt" for i in (3, 5, 6)]
    assert json.loads((tmp_path / "step-00000003.json").read_text())["metric"] == 0.1
    assert (tmp_path / "latest").read_text() == "step-00000006.pt"


def test_a_run_that_went_back_forgets_what_came_after(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, keep=2)
    flip(tmp_path / "step-00000020.pt")
    for cut_short in ("step-00000030.tmp", ".latest.77.tmp"):
        (tmp_path / cut_short).write_text("by a kill")
    assert checkpoints(tmp_path).restore(*trained(0)).step == 10
    saved(tmp_path, 15, keep=2)
    assert names(tmp_path) == ["latest", *(f"step-000000{n}.{kind}" for n in (10, 15) for kind in ("json", "pt"))]
    (tmp_path / "latest").write_text("step-00000010.pt")  # somebody wants to go back
    assert checkpoints(tmp_path).restore(*trained(0)).step == 10
