"""What a job would cost, without its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from workloads import assemble
from workloads.estimate import estimate
from workloads.parts import optimizers
from workloads.spec import JobSpec


def test_it_says_what_the_method_is(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    spec = toy_job(micro_batch_size=4)
    found = estimate(spec, tmp_path, samples=80)
    method = assemble.build_method(spec, assemble.data_info(spec, assemble.open_stream(spec.data["train"])), tmp_path)
    assert found.parameters == sum(p.numel() for p in method.parameters())
    assert found.trained == sum(p.numel() for p in method.parameters() if p.requires_grad)
    built = optimizers.build(method.parameter_groups(), spec.optimizer)
    assert [(g["lr_scale"], g["weight_decay"]) for g in built.param_groups] == [
        (g.lr_scale, g.weight_decay) for g in found.groups
    ]
    assert found.steps == 20 and found.state_bytes == 12 * found.trained + 4 * found.parameters
    assert found.device_hours(1e12, 0.5) == pytest.approx(found.flops * 20 / 0.5e12 / 3600)


def test_activations_grow_with_the_micro_batch_and_flops_with_the_batch(
    toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    one, two = (estimate(toy_job(batch_size=16, micro_batch_size=n), tmp_path) for n in (4, 8))
    assert two.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.05)
    assert one.flops == two.flops and one.steps is None


def test_activations_are_what_autograd_keeps(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    """A linear layer keeps its input: here that of the decoder's last layer, among others."""
    spec = toy_job()
    found = estimate(spec, tmp_path)
    decoded = 8 * 17 * 16 * 4  # batch, tokens, width, bytes
    assert found.activation_bytes > 5 * decoded


def test_a_job_that_cannot_start_is_told(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one visible patch at least"):
        estimate(toy_job(method={"name": "mae", "mask_ratio": 0.99}), tmp_path)
