"""The protocols on features whose answer is known."""

from __future__ import annotations

import pytest
import torch

from workloads.evaluation.base import label_of, summary
from workloads.evaluation.features import Features
from workloads.evaluation.knn import knn_accuracy
from workloads.evaluation.linear_probe import probe_accuracy


def clusters(n: int, noise: float, seed: int) -> Features:
    """Four classes at the corners of a simplex."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    return Features(torch.eye(4)[y] + noise * torch.randn(n, 4, generator=generator), y)


def test_knn_by_hand() -> None:
    """One near neighbour outvotes two far ones: exp(1 / .07) > 2 exp(.8 / .07)."""
    train = Features(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]), torch.tensor([0, 1, 1]))
    test = Features(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    assert knn_accuracy(train, test, k=3, temperature=0.07) == 1.0
    assert knn_accuracy(train, test, k=3, temperature=10.0) == 0.0  # a warm vote counts heads


def test_knn_asks_for_no_more_neighbours_than_there_are() -> None:
    train, test = clusters(8, 0.05, 0), clusters(40, 0.05, 1)
    assert knn_accuracy(train, test, k=20, temperature=0.07) == 1.0


@pytest.mark.parametrize("noise", [0.1, 5.0])
def test_probe_learns_what_is_separable_and_only_that(noise: float) -> None:
    train, test = clusters(200, noise, 0), clusters(200, noise, 1)
    value = probe_accuracy(train, test, epochs=20, batch_size=32, lr=0.5, seed=0)
    assert (value > 0.98) if noise < 1 else (0.15 < value < 0.55)
    assert value == probe_accuracy(train, test, epochs=20, batch_size=32, lr=0.5, seed=0)


def test_probe_does_not_mind_the_scale_of_features() -> None:
    train, test = clusters(100, 0.1, 0), clusters(100, 0.1, 1)
    scaled = [Features(f.x * torch.tensor([1e3, 1e-3, 1.0, 10.0]), f.y) for f in (train, test)]
    assert probe_accuracy(*scaled, epochs=20, batch_size=32, lr=0.5, seed=0) > 0.98


def test_summary_and_labels() -> None:
    assert summary([0.5, 0.7]) == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1414, abs=1e-4),
        "seeds": [0.5, 0.7],
    }
    assert summary([1.0])["std"] == 0.0
    assert (label_of("knn", 10), label_of("knn", None)) == ("knn10", "knn")
