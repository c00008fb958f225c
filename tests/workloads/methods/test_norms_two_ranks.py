"""Two ranks over BatchNorm: what the contract shows of a ViT, for methods whose papers have residual networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toy import difference
from tests.toy_methods import toy_method_job
from tests.two_ranks import TwoRanks
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.train import train


@pytest.mark.parametrize("name", ["moco_v2", "densecl", "look", "coins"])
def test_batchnorm_goes_by_the_batch_of_both_ranks(
    name: str, toy_shards: dict[str, str], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    """Weights, queues and the statistics of queries and keys; 8 images of one rank = 4 on each of two."""
    spec = toy_method_job(
        toy_shards,
        name,
        model={"name": "resnet_cifar", "image_size": 16, "depth": 8},
        optimizer={"lr": 1e-4},  # where rounding opens a ReLU on one side only, a small step keeps the trouble small
        micro_batch_size=None,
        epochs=None,
        steps=4,
    )
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    assert train(spec, one, tmp_path)
    on_two = JobSpec.model_validate(spec.model_dump() | {"resources": {"workers": 2}})
    two_ranks.train(on_two, two, tmp_path, tmp_path / "store")
    expected, got = (weights(run) for run in (one, two))
    moved = [key for key in expected if key.endswith("running_mean") and expected[key].any()]
    assert moved and difference(expected, got) < 5e-5


def weights(run: RunFolder) -> dict[str, Tensor]:
    state = torch.load(run.checkpoints / "step-00000004.pt", weights_only=True)
    found: dict[str, Tensor] = state["method"]
    return found
