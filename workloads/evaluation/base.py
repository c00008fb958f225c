"""The interface of an evaluation: an artifact and labelled data in, metrics out.

Each is run on the pretrained encoder and on the same encoder untrained, under the same
protocol and seeds, so that a number says what pretraining was worth.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from pydantic import Field, field_validator
from torch import nn

from workloads import artifact
from workloads.export import export
from workloads.models.encoders import build_encoder
from workloads.models.vit import ViT
from workloads.place import Place
from workloads.record import RunFolder
from workloads.spec import JobSpec, Stream
from workloads.spec_training import Strict


class TrainTest(Strict):
    """Where the labels are learned from, and where they are asked."""

    train: Stream
    test: Stream


class EvaluationConfig(Strict):
    data: TrainTest
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    untrained: bool = True  # also the same encoder without pretraining
    every_checkpoints: int | None = Field(default=None, ge=1)  # also while it trains, on each n-th checkpoint

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"got seeds {list(seeds)}, expected distinct ones")
        return seeds

    def without_baselines(self) -> Self:
        """The same of the pretrained encoder only: what it is compared with does not change while it trains."""
        baselines = type(self).model_fields.keys() & {"untrained", "raw_pixels"}
        return self.model_copy(update=dict.fromkeys(baselines, False))


@dataclass(frozen=True)
class Subject:
    """What is evaluated, where results may be left, and where it trains and computes."""

    spec: JobSpec
    artifact: Path
    home: Path
    folder: Path
    job_id: str
    should_stop: Callable[[], bool]
    place: Place

    def encoders(self, *, untrained: bool) -> dict[str, nn.Module]:
        """`pretrained` and, if asked, `untrained`: feature extractors [B, 3, H, W] -> [B, D] in eval mode."""
        encoders = {"pretrained": without_head(artifact.load_model(self.artifact))}
        if untrained:
            torch.manual_seed(self.spec.seed)
            encoders["untrained"] = build_encoder(self.spec.model).eval()
        return encoders

    def trained(self, spec: JobSpec, run: RunFolder) -> bool:
        """Trains and exports a job of the evaluation, unless an earlier call has; False when it was stopped."""
        if not run.artifact.exists():
            if not self.place.train(spec, run):
                return False
            export(spec, run, self.home, self.job_id)
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # also those of a call that was killed here
        return True


class Evaluation(Protocol):
    Config: ClassVar[type[EvaluationConfig]]

    def run(self, config: Any, subject: Subject) -> dict[str, Any] | None:
        """`{label, metric, results: {who: {mean, std, seeds}}}`; None when it was stopped."""


def without_head(model: nn.Module) -> nn.Module:
    """A classifier as a feature extractor; an encoder as it is."""
    if isinstance(model, ViT):
        model.head = nn.Identity()
    elif getattr(model, "num_classes", 0):
        model.reset_classifier(0)  # type: ignore[operator]
    return model.eval()


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "seeds": values}


def label_of(name: str, labels_per_class: int | None) -> str:
    return name if labels_per_class is None else f"{name}{labels_per_class}"
