"""The hash behind crops and masks: a bijection, uniform, and the same wherever it is computed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from workloads.data.keys import mix, mix_int, sample_keys, uniform


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_number_is_mixed_as_a_tensor_is(x: int) -> None:
    assert int(mix(torch.tensor([x]))[0]) & (2**64 - 1) == mix_int(x)


def test_splitmix64_golden() -> None:
    """First output of the published generator for seed 0: 0xE220A8397B1DCDAF."""
    assert int(mix(torch.tensor([0]))[0]) & (2**64 - 1) == mix_int(0) == 0xE220A8397B1DCDAF


def test_draws_are_uniform_and_independent_of_their_neighbours() -> None:
    keys = sample_keys(7, 3, torch.arange(4000))
    draws = uniform(keys, 16, salt="test")
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean().item() - 0.5) < 0.005
    assert abs(draws.var().item() - 1 / 12) < 0.002
    correlation = torch.corrcoef(draws.T) - torch.eye(16)
    assert correlation.abs().max() < 0.07
    assert torch.equal(uniform(keys[5:9], 16, salt="test"), draws[5:9])
    assert torch.equal(uniform(keys, 4, salt="test"), draws[:, :4])
    assert not torch.equal(uniform(keys, 16, salt="other"), draws)


def test_keys_differ_by_seed_epoch_and_row() -> None:
    index = torch.arange(1000)
    keys = torch.cat([sample_keys(seed, epoch, index) for seed in range(3) for epoch in range(3)])
    assert len(keys.unique()) == len(keys)
