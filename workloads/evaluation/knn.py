"""Weighted k nearest neighbours on frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4).

Cosine similarity; a neighbour votes with exp(similarity / temperature). With
`labels_per_class` only that many labels of each class are known, drawn anew for each seed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from workloads.evaluation.base import EvaluationConfig, Subject, label_of, summary
from workloads.evaluation.features import Features, feature_sets, few, labelled


class KNNConfig(EvaluationConfig):
    k: int = Field(default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0)
    labels_per_class: int | None = Field(default=None, ge=1)
    raw_pixels: bool = True  # the same vote on the pixels, as a second baseline


def knn_accuracy(train: Features, test: Features, *, k: int, temperature: float) -> float:
    """Share of test rows whose vote is right; features [N, D] are normalised to unit length here."""
    bank, query = F.normalize(train.x, dim=1), F.normalize(test.x, dim=1)
    classes = int(max(train.y.max(), test.y.max())) + 1
    right = 0
    for part, truth in zip(query.split(1024), test.y.split(1024), strict=True):
        similarity, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # [B, k]
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, train.y[index], (similarity / temperature).exp())
        right += int((votes.argmax(dim=1) == truth).sum())
    return right / len(test.y)


class KNN:
    Config: ClassVar[type[EvaluationConfig]] = KNNConfig

    def run(self, config: KNNConfig, subject: Subject) -> dict[str, Any]:
        manifest, held_out = labelled(config)
        sets = feature_sets(manifest, held_out, subject, untrained=config.untrained, raw_pixels=config.raw_pixels)
        n = config.labels_per_class
        results = {}
        for who, (train, test) in sets.items():
            # all labels leave nothing to draw: every seed is the same vote
            parts = [train] if n is None else [few(train, manifest.rows_per_class(n, seed)) for seed in config.seeds]
            results[who] = summary([knn_accuracy(p, test, k=config.k, temperature=config.temperature) for p in parts])
        return {"label": label_of("knn", n), "metric": "accuracy", "results": results}
