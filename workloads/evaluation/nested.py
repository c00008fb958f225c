"""Evaluations that train a classifier: a job of its own for each seed, by the same loop as any other.

With `labels_per_class` it is the few-label protocol: train on that many labels of each
class, drawn by the seed, test on everything. The same is done from fresh weights. The
classifier of the first seed stays as an artifact, which `register` puts into the registry.
"""

from __future__ import annotations

import shutil
from typing import Any

from pydantic import Field

from workloads import artifact
from workloads.evaluation.accuracy import accuracy
from workloads.evaluation.base import EvaluationConfig, Subject, summary
from workloads.evaluation.features import labelled, plain_view
from workloads.export import export
from workloads.record import RunFolder
from workloads.spec import JobName, JobSpec, Named
from workloads.spec_training import Optimizer, Schedule
from workloads.train import train


class NestedConfig(EvaluationConfig):
    labels_per_class: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=32, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    lr: float = Field(default=1e-3, gt=0)  # of the batch: not scaled
    min_lr: float = Field(default=0.0, ge=0)  # where the cosine ends
    warmup_epochs: float = Field(default=5, ge=0)
    register_as: JobName | None = Field(default=None, alias="register")


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
            if not run.artifact.exists():
                if not train(spec, run, subject.home, should_stop=subject.should_stop):
                    return None
                export(spec, run, subject.home, subject.job_id)
            values.append(accuracy(artifact.load_model(run.artifact), test, view))
        results[who] = summary(values)
    kept = subject.folder / "artifact"
    shutil.copytree(subject.folder / f"pretrained-{config.seeds[0]}" / "artifact", kept, dirs_exist_ok=True)
    result = {"label": label, "metric": "accuracy", "results": results, "artifact": str(kept)}
    artifact.write_evaluations(kept, [result | {"artifact": "."}])
    for folder in subject.folder.iterdir():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result | ({"register": config.register_as} if config.register_as else {})


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
        schedule=Schedule(warmup_epochs=config.warmup_epochs, min_lr=config.min_lr),
        precision=subject.spec.precision,
        seed=seed,
        checkpoint=subject.spec.checkpoint.model_copy(update={"mirror": None}),  # the mirror is of the job itself
    )
