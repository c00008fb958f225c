"""A network that follows another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workloads.parts.ema import copy_of, follow


def constant(value: float) -> nn.Linear:
    layer = nn.Linear(2, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def test_a_copy_is_equal_of_its_own_and_not_trained() -> None:
    fast = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    slow = copy_of(fast)
    assert all(torch.equal(slow.state_dict()[name], value) for name, value in fast.state_dict().items())
    assert not any(p.requires_grad for p in slow.parameters())
    assert all(p.requires_grad for p in fast.parameters())
    nn.init.zeros_(fast[0].weight)
    assert slow[0].weight.abs().sum() > 0


@pytest.mark.parametrize(("momentum", "expected"), [(1.0, 1.0), (0.75, 1.5), (0.0, 3.0)])
def test_follow_golden(momentum: float, expected: float) -> None:
    slow, fast = constant(1.0), constant(3.0)
    follow(slow, fast, momentum)
    assert all(torch.equal(p, torch.full_like(p, expected)) for p in slow.parameters())
    assert all(torch.equal(p, torch.full_like(p, 3.0)) for p in fast.parameters())


def test_the_slow_one_keeps_its_precision_and_its_statistics() -> None:
    slow = nn.Sequential(constant(1.0), nn.BatchNorm1d(2))
    fast = nn.Sequential(constant(3.0), nn.BatchNorm1d(2))
    fast[1](torch.randn(8, 2))
    follow(slow, fast.to(torch.bfloat16), 0.999)
    assert slow[0].weight.dtype == torch.float32
    assert slow[0].weight[0, 0].item() == pytest.approx(1.002)  # in bfloat16 it would have stayed at 1
    assert slow[1].running_mean.tolist() == [0, 0]
