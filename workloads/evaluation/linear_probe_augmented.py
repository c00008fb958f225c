"""The linear probe as published, with crops and flips and by LARS: method `linear_probe` by jobs of its own.

`linear_probe` asks the same of features that are computed once: cheaper, and without augmentation.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from workloads.evaluation.base import EvaluationConfig, Subject, label_of
from workloads.evaluation.nested import NestedConfig, train_and_test
from workloads.methods.linear_probe import LinearProbeConfig
from workloads.spec import Named
from workloads.spec_training import Optimizer


class LinearProbeAugmentedConfig(LinearProbeConfig, NestedConfig):
    """In MAE 90 epochs for ViT-B, 50 for L and H; 16,384 samples at a time."""

    epochs: int = Field(default=90, ge=1)
    batch_size: int = Field(default=256, ge=1)
    lr: float = Field(default=6.4, gt=0)  # 0.1 * 16384 / 256; LARS steps by the length of the weights, so it stays
    warmup_epochs: float = Field(default=10, ge=0)


class LinearProbeAugmented:
    Config: ClassVar[type[EvaluationConfig]] = LinearProbeAugmentedConfig

    def run(self, config: LinearProbeAugmentedConfig, subject: Subject) -> dict[str, Any] | None:
        method = Named(name="linear_probe", **config.model_dump(include=set(LinearProbeConfig.model_fields)))
        optimizer = Optimizer(name="lars", weight_decay=0, momentum=0.9, trust_coefficient=0.001)
        return train_and_test(config, subject, label_of("probe_augmented", config.labels_per_class), method, optimizer)
