"""A guard ends a job: the record says why, and a later attempt goes on from before its first sign."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.toy_methods import toy_method_job
from workloads import catalog
from workloads.checkpoint_folder import latest_step, seals
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.record import RunFolder
from workloads.run import FAILED, execute
from workloads.spec import JobSpec
from workloads.train import train

Make = Callable[..., JobSpec]
LAST_GOOD = 6  # step


class FailingConfig(MethodConfig):
    why: Literal["grows", "constant"]


class Failing(Method):
    """After step 6 its loss grows tenfold at each step, or its encoder says the same of every image."""

    Config = FailingConfig
    paper = "none"

    def __init__(self, config: FailingConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.why = config.why
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("late", torch.tensor(0))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        self.late.fill_(max(0, progress.step + 1 - LAST_GOOD))
        loss = (self.weight - batch["image"].mean()).square().sum()
        return Output(loss * (10.0 ** (self.late + 1) if self.why == "grows" and self.late else 1.0))

    def export(self) -> nn.Module:
        return Encoder(0.0 if self.why == "constant" and self.late else 1.0)


class Encoder(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return 1 + self.factor * images.flatten(1)[:, :8]


@pytest.mark.parametrize(
    ("why", "reason", "hint", "suspect"),
    [
        ("grows", r"DivergenceError: the loss .* at step 9 is .* times the largest", "optimizer.lr", 8),
        ("constant", "CollapseError: .* at 2 checkpoints in a row", "guards.min_feature_std", 7),
    ],
)
def test_the_record_says_why_and_a_later_attempt_goes_on_from_before(
    toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, reason: str, hint: str, suspect: int
) -> None:
    load = catalog.load
    monkeypatch.setattr(catalog, "load", lambda kind, name: Failing if name == "failing" else load(kind, name))
    policy = {"every_steps": 1, "keep": 1}
    spec = toy_job(method={"name": "failing", "why": why}, epochs=None, steps=12, log_steps=1, checkpoint=policy)
    run = RunFolder(tmp_path / "run")
    for attempt in (1, 2):
        assert execute(spec, run, tmp_path, job_id="j", attempt=attempt) == FAILED
        record = run.read_record()
        assert record is not None and re.match(reason, record.reason or "") and hint in (record.hint or "")
        assert {seal.step: seal.suspect for seal in seals(run.checkpoints)} == {LAST_GOOD: False, suspect: True}
        assert latest_step(run.checkpoints) == LAST_GOOD
    passed_over = (
        f"checkpoint of step {suspect} is suspect: a guard had begun to count; continued from step {LAST_GOOD}"
    )
    assert passed_over in record.warnings
    went_back = f"{reason.split(':')[0]}: the checkpoint of step {suspect} was written after its first sign; "
    went_back += f"a later attempt goes on from step {LAST_GOOD}"
    assert [event["message"] for event in run.read_events()] == [went_back, passed_over, went_back]


def test_each_checkpoint_has_its_features_in_the_curve(toy_job: Make, tmp_path: Path) -> None:
    """Also the last one, which no point comes after."""
    points = trained(toy_job(epochs=None, steps=10, log_steps=5), tmp_path / "images")
    assert [(point["step"], "rankme" in point) for point in points] == [(5, True), (10, True)]


def test_volumes_are_watched(toy_shards: dict[str, str], tmp_path: Path) -> None:
    points = trained(toy_method_job(toy_shards, "medical_cl", epochs=None, steps=1), tmp_path / "volumes")
    assert points[-1]["feature_std"] > 0 and points[-1]["rankme"] > 1


def trained(spec: JobSpec, folder: Path) -> list[dict[str, Any]]:
    run = RunFolder(folder)
    assert train(spec, run, folder)
    return list(run.read_metrics())
