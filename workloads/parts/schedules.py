"""Schedules: pure functions of how far a run is, so a resumed run has nothing to restore."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from torch.optim import Optimizer

from workloads.spec import JobSpec
from workloads.spec_training import Schedule


def warmup_cosine(t: float, *, warmup: float, total: float, base: float, minimum: float = 0.0) -> float:
    """Linear from 0 to `base` over `warmup`, then half a cosine down to `minimum` at `total`.

    `t`, `warmup` and `total` share a unit (epochs in MAE, fractional within an epoch).
    """
    if t < warmup:
        return base * t / warmup
    return cosine((t - warmup) / max(total - warmup, 1e-12), base, minimum)


def warmup_constant(t: float, *, warmup: float, base: float) -> float:
    """Linear from 0 to `base` over `warmup`, then `base`."""
    return base * t / warmup if t < warmup else base


def warmup_step(t: float, *, warmup: float, base: float, milestones: Sequence[float], gamma: float) -> float:
    """Linear from 0 to `base` over `warmup`; from each milestone on, `gamma` times what it was (He et al. 2016).

    Args:
        t: how far; shares a unit with `warmup` and `milestones`.
        warmup: how long the rate grows.
        base: the highest rate.
        milestones: growing.
        gamma: 0.1 in most papers.
    """
    return warmup_constant(t, warmup=warmup, base=base) * gamma ** bisect.bisect_right(milestones, t)


def cosine(share: float, start: float, end: float) -> float:
    """Half a cosine: exactly `start` at share 0, exactly `end` from share 1 on."""
    left = 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return start * left + end * (1.0 - left)


def ema_momentum(step: int, total: int, base: float, final: float = 1.0) -> float:
    """Momentum of a teacher that follows its student ever more slowly, as in BYOL, MoCo v3 and DINO.

    Args:
        step: optimizer steps done.
        total: those of the run.
        base: momentum of the first step; 0.996 in BYOL (Grill et al. 2020, arXiv:2006.07733) and DINO
            (Caron et al. 2021, arXiv:2104.14294), 0.99 in MoCo v3 (Chen et al. 2021, arXiv:2104.02057).
        final: of the last.
    """
    return cosine(step / max(total, 1), base, final)


def learning_rate(schedule: Schedule, base_lr: float, step: int, total: int, steps_per_epoch: int) -> float:
    """Rate of the step that follows `step` done ones, before the groups' own scales.

    Args:
        schedule: of the job; it counts in epochs.
        base_lr: rate after the warm-up, scaled by batch size where the job says so.
        step: optimizer steps done.
        total: those of the run.
        steps_per_epoch: of the first stream.
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if schedule.name == "cosine":
        return warmup_cosine(step, warmup=warmup, total=total, base=base_lr, minimum=schedule.min_lr)
    milestones = [epoch * steps_per_epoch for epoch in schedule.milestones]  # none where the rate is constant
    return warmup_step(step, warmup=warmup, base=base_lr, milestones=milestones, gamma=schedule.gamma)


def weight_decay(schedule: Schedule, base: float, step: int, total: int) -> float:
    """Weight decay of the step that follows `step` done ones: `base`, or a cosine from it without warm-up (DINO)."""
    end = base if schedule.weight_decay_end is None else schedule.weight_decay_end
    return base if end == base else cosine(step / max(total, 1), base, end)


def apply(optimizer: Optimizer, spec: JobSpec, step: int, total: int, steps_per_epoch: int) -> float:
    """Sets what the step that follows `step` done ones goes by, and returns its rate before the groups' own scales.

    Each group multiplies the rate by its `lr_scale`. A group that says its own weight decay keeps it, so 0 stays 0.

    Args:
        optimizer: of `optimizers.build`.
        spec: the job.
        step: optimizer steps done.
        total: those of the run.
        steps_per_epoch: of the first stream.
    """
    base = spec.optimizer.lr * (spec.batch_size / 256 if spec.optimizer.scale_lr else 1.0)  # Goyal et al. 2017
    lr = learning_rate(spec.schedule, base, step, total, steps_per_epoch)
    decay = weight_decay(spec.schedule, spec.optimizer.weight_decay, step, total)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["follows_weight_decay"]:
            group["weight_decay"] = decay
    return lr
