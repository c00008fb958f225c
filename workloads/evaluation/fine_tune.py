"""Fine-tuning as an evaluation: method `fine_tune` by jobs of its own (see `nested`), with that method's fields."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from workloads.evaluation.base import EvaluationConfig, Subject, label_of
from workloads.evaluation.nested import NestedConfig, train_and_test
from workloads.methods.fine_tune import FineTuneConfig
from workloads.spec import Named
from workloads.spec_training import Optimizer


class FineTuneEvaluationConfig(FineTuneConfig, NestedConfig):
    """In MAE 100 epochs for ViT-B and 50 for L and H, 1,024 samples at a time; its augmentation is off by default."""

    layer_decay: float = Field(default=0.75, gt=0, le=1)
    weight_decay: float = Field(default=0.05, ge=0)


class FineTuneEvaluation:
    Config: ClassVar[type[EvaluationConfig]] = FineTuneEvaluationConfig

    def run(self, config: FineTuneEvaluationConfig, subject: Subject) -> dict[str, Any] | None:
        label = label_of("few_label" if config.labels_per_class else "fine_tune", config.labels_per_class)
        method = Named(name="fine_tune", **config.model_dump(include=set(FineTuneConfig.model_fields)))
        optimizer = Optimizer(weight_decay=config.weight_decay, betas=(0.9, 0.999))
        return train_and_test(config, subject, label, method, optimizer)
