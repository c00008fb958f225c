"""The optimizer of a job.

Torch's optimizers import torch._dynamo when they are made and when they step: 1 to 1.6 s of
every start, only to tell a compiler to keep out. The loop never compiles the step of an
optimizer, so here they run without it.

`optimizer.found_inf`, where set, is a float tensor of one element: where it is 1, `step`
leaves weights, moments and counters as they are, and nobody waits for the device to know it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from workloads import spec_training
from workloads.parts.lars_lamb import Lamb, Lars, own_parts, state_of

for _method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
    _plain = inspect.unwrap(_method)
    vars(_plain)["__dynamo_disable"] = _plain  # where torch itself keeps what it made of the method on the first call


class AdamW(torch.optim.AdamW):
    """Torch's own; Loshchilov and Hutter 2019 (arXiv:1711.05101)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        inspect.unwrap(torch.optim.AdamW.step)(self)


class SGD(torch.optim.SGD):
    """Torch's own kernel, also for weights that are sharded, for which torch has no rule.

    The momentum starts as zeros: torch would leave it unset when the very first step is one that is left out.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            torch._fused_sgd_(
                own_parts(params),
                own_parts(p.grad for p in params),
                own_parts(state_of(self, params, "momentum_buffer")) if group["momentum"] else [],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
                found_inf=getattr(self, "found_inf", None),
            )


def build(groups: Iterable[dict[str, Any]], options: spec_training.Optimizer) -> Optimizer:
    """The optimizer that a job names, over a method's groups; `schedules.apply` sets its rates before each step.

    Args:
        groups: `params`, and if wanted `lr_scale` (1.0) and `weight_decay` (the job's).
        options: of the job.
    """
    if options.name == "adamw":
        return adamw(groups, betas=options.betas, weight_decay=options.weight_decay)
    own = _own_groups(groups, options.weight_decay)
    if options.name == "sgd":
        return SGD(own, lr=0.0, momentum=options.momentum, nesterov=options.nesterov)
    if options.name == "lars":
        return Lars(own, momentum=options.momentum, trust_coefficient=options.trust_coefficient)
    return Lamb(own, betas=options.betas)


def adamw(groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], weight_decay: float) -> AdamW:
    """AdamW over a method's groups.

    Args:
        groups: as those of `build`.
        betas: decay of the first and the second moment.
        weight_decay: of groups that do not say.
    """
    return AdamW(_own_groups(groups, weight_decay), lr=0.0, betas=betas, fused=True)


def _own_groups(groups: Iterable[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    own = []
    for group in groups:
        if not group["params"]:
            continue
        decay = group.get("weight_decay")
        own.append(
            {
                "params": group["params"],
                "lr_scale": group.get("lr_scale", 1.0),
                "weight_decay": weight_decay if decay is None else decay,
                "follows_weight_decay": decay is None,
            }
        )
    return own
