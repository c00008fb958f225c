"""Numbers of the papers, and what every schedule has in common."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workloads.parts.optimizers import build
from workloads.parts.schedules import (
    apply,
    ema_momentum,
    learning_rate,
    warmup_constant,
    warmup_cosine,
    warmup_step,
    weight_decay,
)
from workloads.spec_training import Optimizer, Schedule

RATES = st.floats(1e-6, 10)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Of a run of 100 epochs."""
    name = draw(st.sampled_from(["cosine", "step", "constant"]))
    return Schedule(
        name=name,
        warmup_epochs=draw(st.floats(0, 20)),
        min_lr=draw(st.floats(0, 1e-6)),
        milestones=sorted(draw(st.sets(st.integers(30, 99), min_size=1, max_size=3))) if name == "step" else (),
        gamma=draw(st.floats(0.05, 1)),
    )


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.0), (20, 0.75e-4), (40, 1.5e-4), (420, 0.75e-4), (800, 0.0)])
def test_cosine_of_mae(epoch, rate):
    """MAE (arXiv:2111.06377), table 8: 800 epochs, 40 of warm-up, 1.5e-4."""
    schedule = Schedule(warmup_epochs=40)
    assert learning_rate(schedule, 1.5e-4, epoch * 10, 8000, 10) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.1), (29, 0.1), (30, 0.01), (59, 0.01), (60, 0.001), (79, 0.001), (80, 1e-4), (89, 1e-4)]
)
def test_steps_of_resnet(epoch, rate):
    """ImageNet in 90 epochs, a tenth at 30, 60 and 80: Goyal et al. 2017 (arXiv:1706.02677), section 5.1."""
    schedule = Schedule(name="step", milestones=(30, 60, 80))
    assert learning_rate(schedule, 0.1, epoch * 7, 630, 7) == pytest.approx(rate)


def test_a_milestone_counts_from_its_first_step_on():
    schedule = Schedule(name="step", milestones=(2,), gamma=0.5)
    assert [learning_rate(schedule, 1.0, step, 100, 3) for step in (5, 6)] == [1.0, 0.5]


@pytest.mark.parametrize(("step", "decay"), [(0, 0.04), (25, 0.0927208), (50, 0.22), (75, 0.3472792), (100, 0.4)])
def test_weight_decay_of_dino(step, decay):
    """DINO (arXiv:2104.14294), section 3.2: a cosine from 0.04 to 0.4."""
    assert weight_decay(Schedule(weight_decay_end=0.4), 0.04, step, 100) == pytest.approx(decay, abs=1e-7)


def test_weight_decay_stays_where_no_end_is_set():
    assert {weight_decay(Schedule(), 0.05, step, 100) for step in range(101)} == {0.05}


@pytest.mark.parametrize("base", [0.996, 0.99])
@pytest.mark.parametrize("step", [0, 1, 37, 99, 100])
def test_momentum_of_byol(step, base):
    """BYOL (arXiv:2006.07733), "Optimization": 1 - (1 - base) (cos(pi k / K) + 1) / 2; MoCo v3 with base 0.99."""
    expected = 1 - (1 - base) * (math.cos(math.pi * step / 100) + 1) / 2
    assert ema_momentum(step, 100, base) == pytest.approx(expected, abs=1e-15)


@given(st.integers(1, 10**6), st.floats(0.5, 1), st.floats(0.5, 1))
def test_momentum_starts_and_ends_exactly(total, base, final):
    assert ema_momentum(0, total, base, final) == base
    assert ema_momentum(total, total, base, final) == final


@given(RATES, st.floats(0, 1), st.integers(1, 10**6))
def test_weight_decay_starts_and_ends_exactly_and_never_turns(base, end, total):
    schedule = Schedule(weight_decay_end=end)
    curve = [weight_decay(schedule, base, round(total * i / 20), total) for i in range(21)]
    assert (curve[0], curve[-1]) == (base, end)
    assert curve == pytest.approx(sorted(curve, reverse=end < base), rel=1e-12)


@given(RATES, st.floats(0, 1e-6), st.floats(0.5, 50), st.floats(51, 1000))
def test_cosine_starts_at_0_and_ends_exactly(base, minimum, warmup, total):
    def rate(t):
        return warmup_cosine(t, warmup=warmup, total=total, base=base, minimum=minimum)

    assert (rate(0), rate(warmup), rate(total), rate(total + 1)) == (0, base, minimum, minimum)


@given(schedules(), RATES)
def test_the_rate_is_continuous_at_the_end_of_the_warmup(schedule, base):
    fine = 10**6  # steps an epoch
    end = schedule.warmup_epochs * fine
    before = learning_rate(schedule, base, max(0, math.ceil(end) - 1), 100 * fine, fine)
    after = learning_rate(schedule, base, math.ceil(end), 100 * fine, fine)
    assert after == pytest.approx(base, rel=1e-9)
    if end >= 1:
        assert before == pytest.approx(base, rel=1.001 / end + 1e-9)  # less than a step of the warm-up lower


@given(schedules(), RATES, st.integers(1, 30))
def test_the_rate_grows_then_falls(schedule, base, steps_per_epoch):
    total = 100 * steps_per_epoch
    curve = [learning_rate(schedule, base, step, total, steps_per_epoch) for step in range(total)]
    end = schedule.warmup_epochs * steps_per_epoch  # between two steps, perhaps
    warm, top = math.floor(end) + 1, math.ceil(end)
    assert curve[:warm] == sorted(curve[:warm])
    assert curve[top:] == pytest.approx(sorted(curve[top:], reverse=True), rel=1e-12)
    assert min(curve) >= 0 and max(curve) <= base * (1 + 1e-12)


def test_a_warmup_longer_than_the_run_only_grows():
    shapes = [
        warmup_cosine(5, warmup=10, total=8, base=1.0),
        warmup_constant(5, warmup=10, base=1.0),
        warmup_step(5, warmup=10, base=1.0, milestones=[6], gamma=0.1),
    ]
    assert shapes == [0.5, 0.5, 0.5]


def test_apply_sets_every_group(toy_job):
    spec = toy_job(
        optimizer={"lr": 0.1, "weight_decay": 0.04, "scale_lr": True},
        schedule={"name": "constant", "weight_decay_end": 0.4},
        batch_size=512,
    )
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)], "lr_scale": 0.5},
        {"params": [torch.zeros(1, requires_grad=True)], "weight_decay": 0.0},
        {"params": [torch.zeros(1, requires_grad=True)], "weight_decay": 0.3},
    ]
    optimizer = build(groups, spec.optimizer)
    assert apply(optimizer, spec, 50, 100, 10) == 0.2
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(0.22), 0.0, 0.3]


def test_a_job_without_a_schedule_of_the_decay_leaves_it():
    optimizer = build([{"params": [torch.zeros(1, requires_grad=True)]}], Optimizer(name="sgd", weight_decay=1e-4))
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
