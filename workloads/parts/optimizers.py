"""The optimizer of a job.

Torch's optimizers import torch._dynamo when they are made and when they step: 1 to 1.6 s of
every start, only to tell a compiler to keep out. The loop never compiles a step, so here
they run without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

for _method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
    _plain = inspect.unwrap(_method)
    vars(_plain)["__dynamo_disable"] = _plain  # where torch itself keeps what it made of the method on the first call


class AdamW(torch.optim.AdamW):
    """Torch's own; Loshchilov and Hutter 2019 (arXiv:1711.05101)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        inspect.unwrap(torch.optim.AdamW.step)(self)


def adamw(groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], weight_decay: float) -> AdamW:
    """AdamW over a method's groups; each keeps its `lr_scale` for the schedule, and its own weight decay if it has one.

    Args:
        groups: `params`, and if wanted `lr_scale` (1.0) and `weight_decay`.
        betas: decay of the first and the second moment.
        weight_decay: of groups that do not say.
    """
    own = [
        {
            "params": group["params"],
            "lr_scale": group.get("lr_scale", 1.0),
            "weight_decay": weight_decay if group.get("weight_decay") is None else group["weight_decay"],
        }
        for group in groups
        if group["params"]
    ]
    return AdamW(own, lr=0.0, betas=betas, fused=True)
