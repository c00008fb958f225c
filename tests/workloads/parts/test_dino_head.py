"""The head of DINO: prototypes of unit length, and what it is to freeze them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.parts.dino_head import DINOHead


def head(**options: bool) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(6, 10, hidden=8, bottleneck=4, **options)


def loss(made: DINOHead, x: Tensor, *, frozen: bool = False) -> Tensor:
    return F.cross_entropy(made(x, frozen=frozen) / 0.1, torch.arange(len(x)))


def test_sizes_of_the_paper() -> None:
    """Appendix C for ViT-S: 22 M parameters, three quarters of them prototypes."""
    with torch.device("meta"):
        made = DINOHead(384, 65536)
    assert [type(part) for part in made.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert [tuple(part.weight.shape) for part in made.mlp[::2]] == [(2048, 384), (2048, 2048), (256, 2048)]
    assert tuple(made.last.weight.shape) == (65536, 256) and made.last.bias is None


def test_logits_are_cosines() -> None:
    made, x = head(), torch.randn(5, 6)
    z, w = made.mlp(x), made.last.weight
    expected = torch.stack([F.cosine_similarity(z, row.expand_as(z)) for row in w], dim=1)
    assert torch.allclose(made(x), expected, atol=1e-6)
    with torch.no_grad():
        made.last.weight.mul_(torch.rand(10, 1) + 0.5)
    assert torch.allclose(made(x), expected, atol=1e-6), "the gain is 1 whatever the length of a row"
    assert torch.allclose(made(x.view(1, 5, 6)), expected, atol=1e-6), "of tokens as of images"


def test_a_frozen_last_layer_gets_a_gradient_of_zero_and_says_the_same() -> None:
    made, x = head(), torch.randn(5, 6)
    assert torch.equal(made(x, frozen=True), made(x))
    loss(made, x, frozen=True).backward()
    assert made.last.weight.grad is not None and made.last.weight.grad.abs().max() == 0
    assert all(part.weight.grad.abs().max() > 0 for part in made.mlp[::2])
    rest = [part.weight.grad for part in made.mlp[::2]]
    made.zero_grad()
    loss(made, x).backward()
    assert made.last.weight.grad.abs().max() > 0
    assert all(torch.equal(a, part.weight.grad) for a, part in zip(rest, made.mlp[::2], strict=True))


def test_no_direction_moves_while_the_last_layer_is_frozen() -> None:
    """AdamW decays the rows meanwhile, which changes no logit."""
    made, x = head(), torch.randn(5, 6)
    optimizer = torch.optim.AdamW(made.last.parameters(), lr=0.01, weight_decay=0.4)
    before, logits = made.last.weight.detach().clone(), made(x).detach()
    for frozen in (True, True, False):
        optimizer.zero_grad()
        loss(made, x, frozen=frozen).backward()
        optimizer.step()
        cosines = F.cosine_similarity(made.last.weight, before)
        if frozen:
            assert torch.allclose(cosines, torch.ones(10), atol=1e-6)
            assert torch.allclose(made(x), logits, atol=1e-6)
    assert made.last.weight.norm() < before.norm() and cosines.min() < 0.9999


def test_moments_that_counted_frozen_steps_make_longer_steps() -> None:
    """Up to 6.6 times as long as fresh ones under betas (.9, .999), 12 steps after the release: `DINO`'s docstring."""
    moved = []
    for frozen_steps in (0, 10_000):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        weight.grad = torch.zeros(1)
        for _ in range(frozen_steps):
            optimizer.step()
        lengths = []
        for _ in range(30):
            weight.grad, before = torch.ones(1), weight.item()
            optimizer.step()
            lengths.append(before - weight.item())
        moved.append(lengths)
    fresh, counted = moved
    assert fresh == pytest.approx([1.0] * 30, rel=1e-4)
    assert max(counted) == pytest.approx(6.57, abs=0.01) and counted.index(max(counted)) == 11


def test_with_batch_norm_the_layers_before_it_have_no_bias() -> None:
    made = head(batch_norm=True)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.GELU] * 2 + [nn.Linear]
    assert [type(part) for part in made.mlp] == kinds
    assert [part.bias is None for part in made.mlp if isinstance(part, nn.Linear)] == [True, True, False]
    x = torch.randn(5, 6)
    assert torch.allclose(made(x), made(x + 3.0), atol=1e-2), "what is added to every sample is taken out again"
