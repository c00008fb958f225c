"""Zen-Score by the numbers of the released code (arXiv 2102.01063)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from workloads.models.structure import parse
from workloads.models.zennet import published
from workloads.search import zen_score as scoring
from workloads.search.zen_score import zen_score

TINY = parse(
    "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,1)SuperResK1K3K1(16,24,2,8,1)SuperConvK1BNRELU(24,32,1,1)"
)


@pytest.fixture(autouse=True)
def classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code draws the weights of a classifier too, behind the last convolution's."""
    drawn = scoring._normal

    def normal(shape: tuple[int, ...], *source: Any) -> torch.Tensor:
        weights = drawn(shape, *source)
        if shape == (32, 24, 1, 1):
            drawn((10, 32), *source)
        return weights

    monkeypatch.setattr(scoring, "_normal", normal)


def tiny(seed: int, g: float = 0.01) -> tuple[float, float, float]:
    torch.manual_seed(seed)
    return zen_score(TINY, size=16, batch_size=8, g=g)


@pytest.mark.parametrize(("seed", "score"), [(0, 7.750490), (1, 7.663898), (2, 7.703864), (3, 7.715120), (4, 7.844003)])
def test_scores_of_the_released_code(seed: int, score: float) -> None:
    assert tiny(seed)[0] == pytest.approx(score, abs=1e-3)


def test_both_terms() -> None:
    _, delta, scale = tiny(0)
    assert (delta, scale) == pytest.approx((10.197520, 5.428346), abs=1e-3)


def test_the_score_grows_with_the_perturbation() -> None:
    found = [tiny(0, g)[0] for g in (0.001, 0.01, 0.1)]
    assert found[::2] == pytest.approx([5.464078, 9.880869], abs=1e-3)
    assert found[2] - found[0] == pytest.approx(2 * math.log(10), abs=0.3)


def test_the_scale_of_weights_counts_by_layer_in_exact_variances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled, each of the 10 convolutions adds log 2; the distance stays. Up to the eps of BatchNorm."""
    norm = torch.nn.functional.batch_norm
    monkeypatch.setattr(
        torch.nn.functional, "batch_norm", lambda *args: norm(*args[:6], 1.0, *args[7:])
    )  # a momentum of 1: of the last batch alone
    before = tiny(0)
    normal = torch.Tensor.normal_

    def doubled(tensor: torch.Tensor, **options: object) -> torch.Tensor:
        drawn = normal(tensor, **options)  # type: ignore[arg-type]
        return drawn.mul_(2) if tensor.ndim == 4 and tensor.shape[-1] < 16 else drawn  # not the images

    monkeypatch.setattr(torch.Tensor, "normal_", doubled)
    after = tiny(0)
    convs = sum(len(branch.convs) for part in TINY for branch in part.branches())
    assert convs == 10
    assert after[2] - before[2] == pytest.approx(convs * math.log(2), abs=2e-3)
    assert after[1] == pytest.approx(before[1], rel=1e-2)


def test_networks_of_the_paper_are_ranked_by_their_budget() -> None:
    """96.76, 122.49 and 149.26, each about +- .9 by four seeds; where the search starts, 15.39 +- .03."""
    start = parse(
        "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,1,8,1)SuperResK3K3(16,32,2,16,1)SuperResK3K3(32,64,2,32,1)"
        "SuperResK3K3(64,64,2,32,1)SuperConvK1BNRELU(64,128,1,1)"
    )
    networks = [start, *(parse(published()[f"cifar-{budget}M"]["structure"]) for budget in ("0.5", "1", "2"))]
    generator = torch.Generator().manual_seed(0)
    found = [zen_score(network, size=32, batch_size=16, generator=generator).score for network in networks]
    assert found[0] == pytest.approx(15.39, abs=0.15)
    assert found[1:] == pytest.approx([96.76, 122.49, 149.26], abs=4)
    assert found == sorted(found)


def test_the_generator_decides_everything() -> None:
    scores = [zen_score(TINY, size=16, batch_size=4, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert scores[0] == scores[1] != zen_score(TINY, size=16, batch_size=4)
