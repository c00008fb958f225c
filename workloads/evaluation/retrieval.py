"""Recall@k: whether an image of the same class is among the k nearest (Song et al. 2016, arXiv 1511.06452).

Each test image asks all others of the test set, by the cosine of frozen features; nothing is learned, and the training
part of `data` is not read. A class of one image can never be found: its image does not ask.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from workloads.data.manifest import DataError
from workloads.evaluation.base import EvaluationConfig, Subject, summary
from workloads.evaluation.features import Features, extract, labelled, plain_view


class RetrievalConfig(EvaluationConfig):
    """The result is the recall of the first `k`; `recall` beside it holds that of each."""

    ks: tuple[int, ...] = Field(default=(1, 2, 4, 8), min_length=1)

    @field_validator("ks")
    @classmethod
    def _positive(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if min(ks) < 1:
            raise ValueError(f"got ks={list(ks)}, expected numbers of neighbours, 1 or more")
        return ks


def recall_at(features: Features, ks: tuple[int, ...]) -> dict[int, float]:
    """K -> share of rows with one of their own class among the k nearest others.

    Args:
        features: [N, D], of any length, and classes [N].
        ks: numbers of neighbours.

    Raises:
        DataError: no class has two images.
    """
    x, y = F.normalize(features.x, dim=1), features.y
    asks = (torch.bincount(y)[y] > 1).nonzero()[:, 0]
    if not len(asks):
        raise DataError(f"got {len(y)} test images, each of another class, expected two of a class at least")
    first = []
    for rows in asks.split(1024):
        similarity = x[rows] @ x.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # not itself
        nearest = similarity.topk(min(max(ks), len(x) - 1), dim=1).indices
        hit = y[nearest] == y[rows, None]
        first.append(torch.where(hit.any(dim=1), hit.int().argmax(dim=1), len(x)))
    place = torch.cat(first)  # of the nearest of the same class
    return {k: float((place < k).float().mean()) for k in ks}


class Retrieval:
    Config: ClassVar[type[EvaluationConfig]] = RetrievalConfig

    def run(self, config: RetrievalConfig, subject: Subject) -> dict[str, Any]:
        _, test = labelled(config)
        view = plain_view(subject)
        recall = {
            who: recall_at(subject.place.scan(extract, model, test, view), config.ks)
            for who, model in subject.encoders(untrained=config.untrained).items()
        }
        results = {who: summary([values[config.ks[0]]]) for who, values in recall.items()}
        return {"label": f"recall@{config.ks[0]}", "metric": "recall", "results": results, "recall": recall}
