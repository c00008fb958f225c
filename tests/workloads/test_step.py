"""One optimizer step: what is not finite changes nothing, is counted, and ends the job in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from workloads import catalog, checkpoint
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.metrics import NonFiniteLossError
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.step import LossScale, seed_micro_batch
from workloads.train import train

Make = Callable[..., JobSpec]


class Breaking(Method):
    """A quadratic whose loss or gradient is not finite at given steps."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    paper = "none"
    exports = "classifier"
    bad: ClassVar[dict[int, str]] = {}
    seen: ClassVar[list[tuple[int, float]]] = []

    def __init__(self, config: Any, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        self.seen.append((progress.step, self.weight.sum().item()))
        factor, added = torch.ones(()), torch.zeros(())
        match self.bad.get(progress.step):
            case "loss":
                factor = torch.tensor(float("nan"))
            case "loss alone":  # its gradient is finite
                added = torch.tensor(float("inf"))
            case "gradient":  # the loss is finite, its root at 0 has an infinite slope
                factor = (self.weight[0] - self.weight[0]).sqrt() + 1
        loss: Tensor = (self.weight * factor - batch["image"].mean()).square().sum() + added
        return Output(loss)


@pytest.fixture
def breaking(toy_job: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    load = catalog.load
    monkeypatch.setattr(catalog, "load", lambda kind, name: Breaking if name == "breaking" else load(kind, name))
    monkeypatch.setattr(Breaking, "seen", [])
    monkeypatch.setattr(Breaking, "bad", {})

    def make(**changes: Any) -> JobSpec:
        return toy_job(method={"name": "breaking"}, epochs=None, steps=20, **changes)

    return make


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb"])
@pytest.mark.parametrize("kind", ["loss", "loss alone", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    breaking: Make, tmp_path: Path, name: str, kind: str
) -> None:
    Breaking.bad.update({3: kind, 4: kind, 12: kind})
    run = RunFolder(tmp_path / "run")
    assert train(breaking(optimizer={"name": name, "lr": 1e-2}), run, tmp_path)
    weight = dict(Breaking.seen)
    assert weight[3] == weight[4] == weight[5] != weight[6] and weight[12] == weight[13] != weight[14]
    points = list(run.read_metrics())
    assert [point.get("skipped_steps", 0) for point in points] == [2, 0, 1, 0]
    assert all(point["loss"] is not None for point in points)


def test_too_many_in_a_row_end_the_job_and_keep_the_checkpoint(breaking: Make, tmp_path: Path) -> None:
    Breaking.bad.update(dict.fromkeys(range(8, 20), "loss"))
    run = RunFolder(tmp_path / "run")
    with pytest.raises(NonFiniteLossError, match="not finite in 12 steps in a row up to step 20"):
        train(breaking(), run, tmp_path)
    assert checkpoint.latest_step(run.checkpoints) == 15
    assert list(run.read_metrics())[-1]["loss"] is None


def test_a_row_is_counted_over_a_resume(breaking: Make, tmp_path: Path) -> None:
    Breaking.bad.update(dict.fromkeys(range(8, 20), "loss"))
    run = RunFolder(tmp_path / "run")
    assert not train(breaking(), run, tmp_path, should_stop=lambda: len(Breaking.seen) >= 14)
    with pytest.raises(NonFiniteLossError, match="in 12 steps in a row up to step 20"):
        train(breaking(), run, tmp_path)


def test_loss_scale_halves_at_once_and_doubles_in_time() -> None:
    scale = LossScale(torch.device("cpu"))
    start = scale.value.item()
    scale.update(torch.tensor(1.0))
    assert scale.value == start / 2
    for _ in range(LossScale.INTERVAL):
        scale.update(torch.tensor(0.0))
    assert scale.value == start and scale.good == 0


def test_a_resume_brings_back_the_loss_scale(breaking: Make, tmp_path: Path) -> None:
    Breaking.bad[1] = "gradient"
    spec, whole, halves = breaking(precision="fp16"), RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "halves")
    assert train(spec, whole, tmp_path)
    polls = iter([False] * 2 + [True])
    assert not train(spec, halves, tmp_path, should_stop=lambda: next(polls))
    assert train(spec, halves, tmp_path)
    files = [run.checkpoints / "step-00000020.pt" for run in (whole, halves)]
    extra = [torch.load(file, weights_only=True)["extra"] for file in files]
    assert extra[0] == extra[1] == {"skipped_in_a_row": 0, "scale": 2**15, "good": 18}


def test_fp16_follows_fp32_and_resumes(toy_job: Make, tmp_path: Path) -> None:
    runs = {name: RunFolder(tmp_path / name) for name in ("fp32", "fp16", "halves")}
    half = toy_job(precision="fp16", epochs=None, steps=6)
    assert train(toy_job(epochs=None, steps=6), runs["fp32"], tmp_path)
    assert train(half, runs["fp16"], tmp_path)
    polls = iter([False] * 2 + [True])
    assert not train(half, runs["halves"], tmp_path, should_stop=lambda: next(polls))
    assert train(half, runs["halves"], tmp_path)
    states = {n: torch.load(r.checkpoints / "step-00000006.pt", weights_only=True) for n, r in runs.items()}
    for name, value in states["fp16"]["method"].items():
        assert torch.equal(value, states["halves"]["method"][name])
    losses = {name: [point["loss"] for point in run.read_metrics()][-1] for name, run in runs.items()}
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02) and losses["fp16"] != losses["fp32"]


def test_micro_batches_are_seeded_apart() -> None:
    draws = set()
    for step in range(3):
        for micro_batch in range(3):
            seed_micro_batch(0, step, micro_batch, torch.device("cpu"))
            draws.add(torch.rand(1).item())
    assert len(draws) == 9
