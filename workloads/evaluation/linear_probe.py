"""Linear probe on frozen features: normalise each feature, then one linear layer.

MAE's probe (BatchNorm without affine, weights N(0, 0.01), no weight decay, cosine rate)
on features that are computed once, so without its crops and flips, and by SGD with
momentum rather than LARS, which exists for batches of 16,384 (`linear_probe_augmented` has
both).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from workloads.evaluation.base import EvaluationConfig, Subject, label_of, summary
from workloads.evaluation.features import Features, feature_sets, few, labelled
from workloads.parts.schedules import warmup_cosine


class LinearProbeConfig(EvaluationConfig):
    epochs: int = Field(default=90, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=0.1, gt=0)  # for 256 samples: scaled by batch_size / 256
    labels_per_class: int | None = Field(default=None, ge=1)
    raw_pixels: bool = True


def probe_accuracy(train: Features, test: Features, *, epochs: int, batch_size: int, lr: float, seed: int) -> float:
    """Trains the layer on `train` and returns the accuracy on `test`; the seed sets weights and order."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(max(train.y.max(), test.y.max())) + 1
    mean, std = train.x.mean(dim=0), train.x.var(dim=0, unbiased=False).add(1e-6).sqrt()
    x, x_test = (train.x - mean) / std, (test.x - mean) / std  # what BatchNorm's running statistics converge to
    head = nn.Linear(x.shape[1], classes)
    nn.init.trunc_normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    size = min(batch_size, len(x))
    base = lr * size / 256
    steps = len(x) // size
    optimizer = torch.optim.SGD(head.parameters(), lr=base, momentum=0.9)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            t = epoch + step / steps
            optimizer.param_groups[0]["lr"] = warmup_cosine(t, warmup=epochs / 9, total=epochs, base=base)
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows]), train.y[rows]).backward()
            optimizer.step()
    with torch.inference_mode():
        return float((head(x_test).argmax(dim=1) == test.y).float().mean())


class LinearProbe:
    Config: ClassVar[type[EvaluationConfig]] = LinearProbeConfig

    def run(self, config: LinearProbeConfig, subject: Subject) -> dict[str, Any]:
        manifest, held_out = labelled(config)
        sets = feature_sets(manifest, held_out, subject, untrained=config.untrained, raw_pixels=config.raw_pixels)
        n = config.labels_per_class
        results = {
            who: summary(
                [
                    probe_accuracy(
                        train if n is None else few(train, manifest.rows_per_class(n, seed)),
                        test,
                        epochs=config.epochs,
                        batch_size=config.batch_size,
                        lr=config.lr,
                        seed=seed,
                    )
                    for seed in config.seeds
                ]
            )
            for who, (train, test) in sets.items()
        }
        return {"label": label_of("probe", n), "metric": "accuracy", "results": results}
