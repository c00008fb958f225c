"""Fine-tuning as an evaluation: a job of method `fine_tune` for each seed, by the same loop as any other.

With `labels_per_class` it is the few-label protocol: train on that many labels of each
class, drawn by the seed, test on everything. The same is done from fresh weights. The
classifier of the first seed stays as an artifact, which `register` puts into the registry.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from workloads import artifact
from workloads.evaluation.accuracy import accuracy
from workloads.evaluation.base import EvaluationConfig, Subject, label_of, summary
from workloads.evaluation.features import labelled, plain_view
from workloads.export import export
from workloads.methods.fine_tune import Augmentation
from workloads.record import RunFolder
from workloads.spec import JobName, JobSpec, Named
from workloads.spec_training import Optimizer, Schedule
from workloads.train import train

logger = logging.getLogger(__name__)


class FineTuneEvaluationConfig(EvaluationConfig):
    labels_per_class: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=100, ge=1)  # MAE's ViT-B; 50 for L and H
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    warmup_epochs: float = Field(default=5, ge=0)
    view: Augmentation = Augmentation()
    register_as: JobName | None = Field(default=None, alias="register")


class FineTuneEvaluation:
    Config: ClassVar[type[EvaluationConfig]] = FineTuneEvaluationConfig

    def run(self, config: FineTuneEvaluationConfig, subject: Subject) -> dict[str, Any] | None:
        _, test = labelled(config)
        view = plain_view(subject)
        results: dict[str, Any] = {}
        for who in ("pretrained", "untrained") if config.untrained else ("pretrained",):
            values = []
            for seed in config.seeds:
                folder = subject.folder / f"{who}-{seed}"
                if not self._train(config, subject, folder, seed, pretrained=who == "pretrained"):
                    return None
                values.append(accuracy(artifact.load_model(folder / "artifact"), test, view))
            results[who] = summary(values)
        kept = subject.folder / "artifact"
        shutil.copytree(subject.folder / f"pretrained-{config.seeds[0]}" / "artifact", kept, dirs_exist_ok=True)
        label = label_of("few_label" if config.labels_per_class else "fine_tune", config.labels_per_class)
        result = {"label": label, "metric": "accuracy", "results": results, "artifact": str(kept)}
        artifact.write_evaluations(kept, [result | {"artifact": "."}])
        for seed in config.seeds:
            for who in results:
                shutil.rmtree(subject.folder / f"{who}-{seed}" / "checkpoints", ignore_errors=True)
        return result | ({"register": config.register_as} if config.register_as else {})

    def _train(
        self, config: FineTuneEvaluationConfig, subject: Subject, folder: Path, seed: int, *, pretrained: bool
    ) -> bool:
        """One nested run; continues or skips what an interrupted evaluation already did."""
        run = RunFolder(folder)
        if run.artifact.exists():
            return True
        spec = nested_spec(config, subject, seed, pretrained=pretrained)
        if not train(spec, run, subject.home, should_stop=subject.should_stop):
            return False
        export(spec, run, subject.home, subject.job_id)
        return True


def nested_spec(config: FineTuneEvaluationConfig, subject: Subject, seed: int, *, pretrained: bool) -> JobSpec:
    """The JobSpec of one fine-tuning run."""
    stream = config.data.train
    if config.labels_per_class is not None:
        stream = stream.model_copy(update={"per_class": config.labels_per_class, "subset_seed": seed})
    method = {
        "layer_decay": config.layer_decay,
        "drop_path": config.drop_path,
        "label_smoothing": config.label_smoothing,
        "view": config.view.model_dump(),
    }
    return JobSpec(
        name=f"{subject.spec.name[:50]}-fine-tune",
        method=Named(name="fine_tune", **method),
        model=subject.spec.model,
        data={"train": stream},
        init=str(subject.artifact) if pretrained else None,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=Optimizer(lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999)),
        schedule=Schedule(warmup_epochs=config.warmup_epochs),
        precision=subject.spec.precision,
        seed=seed,
        checkpoint=subject.spec.checkpoint.model_copy(update={"mirror": None}),  # the mirror is of the job itself
    )
