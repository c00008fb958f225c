"""Recall@k by hand, and against the plain definition."""

from __future__ import annotations

import pytest
import torch

from workloads.data.manifest import DataError
from workloads.evaluation.features import Features
from workloads.evaluation.retrieval import RetrievalConfig, recall_at


def test_by_hand() -> None:
    """On a circle at 0, 10, 30, 100 and 180 degrees: the last one is alone in its class and does not ask."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 30.0, 100.0, 180.0]))
    x = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 5.0, 0.1, 3.0, 1.0])[:, None]
    features = Features(x, torch.tensor([0, 1, 0, 1, 2]))
    # 0: 10, then 30 -> 2nd. 10: 0, 30, then 100 -> 3rd. 30: 10, then 0 -> 2nd. 100: 30, 180, then 10 -> 3rd.
    assert recall_at(features, (1, 2, 3, 50)) == {1: 0.0, 2: 0.5, 3: 1.0, 50: 1.0}


def test_it_is_the_plain_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=generator), torch.randint(0, 7, (60,), generator=generator)
    similarity = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    for k, value in recall_at(Features(x, y), (1, 4)).items():
        found = [
            y[i] in y[[j for j in similarity[i].argsort(descending=True).tolist() if j != i][:k]] for i in range(60)
        ]
        assert value == pytest.approx(sum(found) / 60)


def test_wrong_input() -> None:
    with pytest.raises(DataError, match="expected two of a class at least"):
        recall_at(Features(torch.eye(3), torch.arange(3)), (1,))
    data = {"train": {"shards": "a.tar"}, "test": {"shards": "b.tar"}}
    with pytest.raises(ValueError, match="1 or more"):
        RetrievalConfig.model_validate({"data": data, "ks": [0, 1]})
