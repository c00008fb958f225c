"""Evaluations that train a classifier: a job of its own for each seed, by the same loop as any other.

With `labels_per_class` it is the few-label protocol: train on that many labels of each
class, drawn by the seed, test on everything: by one worker; else by as many as the job has and
the batch allows. The same is done from fresh weights. The
classifier of the first seed stays as an artifact, which `register` puts into the registry.
"""

from __future__ import annotations

import math
import shutil
from typing import Any, Self

from pydantic import Field, model_validator

from workloads import artifact
from workloads.evaluation.accuracy import accuracy
from workloads.evaluation.base import EvaluationConfig, Subject, summary
from workloads.evaluation.features import labelled, plain_view
from workloads.record import RunFolder
from workloads.spec import JobName, JobSpec, Named
from workloads.spec_training import Optimizer, Resources, Schedule


class NestedConfig(EvaluationConfig):
    labels_per_class: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=32, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    lr: float = Field(default=1e-3, gt=0)  # of the batch: not scaled
    min_lr: float = Field(default=0.0, ge=0)  # where the cosine ends
    warmup_epochs: float = Field(default=5, ge=0)
    register_as: JobName | None = Field(default=None, alias="register")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"got micro_batch_size={self.micro_batch_size} for batch_size={self.batch_size}, expected a divisor; "
                f"use {math.gcd(self.micro_batch_size, self.batch_size)}"
            )
        return self


def train_and_test(
    config: NestedConfig, subject: Subject, label: str, method: Named, optimizer: Optimizer
) -> dict[str, Any] | None:
    """Trains for each seed, from what is evaluated and from fresh weights, and asks each classifier.

    Args:
        config: of the evaluation.
        subject: what is evaluated.
        label: of the result.
        method: that trains; it exports a classifier.
        optimizer: its optimizer, `lr` excepted.

    Returns:
        The result of the evaluation; None when it was stopped. Called again, it goes on where it was.
    """
    _, test = labelled(config)
    view = plain_view(subject)
    results: dict[str, Any] = {}
    for who in ("pretrained", "untrained") if config.untrained else ("pretrained",):
        values = []
        for seed in config.seeds:
            spec = nested_spec(config, subject, method, optimizer, seed, pretrained=who == "pretrained")
            run = RunFolder(subject.folder / f"{who}-{seed}")
            if not subject.trained(spec, run):
                return None
            values.append(subject.place.scan(accuracy, artifact.load_model(run.artifact), test, view))
        results[who] = summary(values)
    kept = subject.folder / "artifact"
    shutil.copytree(subject.folder / f"pretrained-{config.seeds[0]}" / "artifact", kept, dirs_exist_ok=True)
    result = {"label": label, "metric": "accuracy", "results": results, "artifact": str(kept)}
    artifact.write_evaluations(kept, [result | {"artifact": "."}])
    return result | ({"register": config.register_as} if config.register_as else {})


def resources_of(config: NestedConfig, job: Resources) -> Resources:
    """Those of the job, with as many of its workers as share the micro-batches evenly; one where labels are few."""
    parts = config.batch_size // (config.micro_batch_size or 1)
    most = next(n for n in range(job.max_workers, 0, -1) if parts % n == 0)
    if config.labels_per_class is not None:
        most = 1
    return job.model_copy(update={"workers": most if most <= job.min_workers else (job.min_workers, most)})


def nested_spec(
    config: NestedConfig, subject: Subject, method: Named, optimizer: Optimizer, seed: int, *, pretrained: bool
) -> JobSpec:
    """The JobSpec of one run; see `train_and_test`."""
    stream = config.data.train
    if config.labels_per_class is not None:
        stream = stream.model_copy(update={"per_class": config.labels_per_class, "subset_seed": seed})
    return JobSpec(
        name=f"{subject.spec.name[:50]}-{method.name.replace('_', '-')}",
        method=method,
        model=subject.spec.model,
        data={"train": stream},
        init=str(subject.artifact) if pretrained else None,
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        optimizer=optimizer.model_copy(update={"lr": config.lr}),
        resources=resources_of(config, subject.spec.resources),
        engine=subject.spec.engine,
        schedule=Schedule(warmup_epochs=config.warmup_epochs, min_lr=config.min_lr),
        precision=subject.spec.precision,
        seed=seed,
        checkpoint=subject.spec.checkpoint.model_copy(update={"mirror": None}),  # the mirror is of the job itself
    )
