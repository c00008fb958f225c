"""LARS and LAMB: each weight matrix takes a step in proportion to its own length, for batches of thousands.

timm's are neither: without weight decay its LARS is plain SGD (the probe of MAE has none),
and a step with `found_inf` (see `optimizers`) is not left out.

Under FSDP the update runs on what a rank holds; lengths are those of whole tensors, one
exchange for all of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lars(Optimizer):
    """You et al. 2017 (arXiv:1708.03888) in the form of MoCo v3 and the linear probe of MAE.

    d = g + weight_decay * w;   d *= trust_coefficient * |w| / |d|  (two dimensions or more)
    m = momentum * m + d;       w -= lr * m

    The paper divides by |g| + weight_decay * |w|, which is the same without weight decay. It and SimCLR's code have the
    rate inside the momentum, m = momentum * m + lr * d and w -= m, which is the same while the rate is constant.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, trust_coefficient: float) -> None:
        defaults = {"lr": 0.0, "momentum": momentum, "trust_coefficient": trust_coefficient, "weight_decay": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            weights, gradients = own_parts(params), own_parts(p.grad for p in params)
            moments = own_parts(state_of(self, params, "momentum_buffer"))
            updates = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            _scale_by_trust(params, weights, updates, group["trust_coefficient"])
            _zero_where(found_inf, updates)
            torch._foreach_mul_(moments, _unless(found_inf, group["momentum"], 1.0))
            torch._foreach_add_(moments, updates)
            torch._foreach_add_(weights, torch._foreach_mul(moments, _unless(found_inf, -group["lr"], 0.0)))


class Lamb(Optimizer):
    """You et al. 2020 (arXiv:1904.00962), algorithm 2, with phi(z) = z.

    m = beta1 * m + (1 - beta1) * g;   v = beta2 * v + (1 - beta2) * g^2
    d = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
    d *= |w| / |d|  (two dimensions or more);   w -= lr * d
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float = 1e-6) -> None:
        # capturable: torch's word for counters that live on the device, and come back to it with a checkpoint
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, "capturable": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            weights, gradients = own_parts(params), own_parts(p.grad for p in params)
            first, second = (own_parts(state_of(self, params, name)) for name in ("exp_avg", "exp_avg_sq"))
            for p in params:
                self.state[p].setdefault("step", torch.zeros((), device=p.device))
            steps = [self.state[p]["step"] for p in params]
            beta1, beta2 = group["betas"]
            _zero_where(found_inf, gradients)
            torch._foreach_mul_(first, _unless(found_inf, beta1, 1.0))
            torch._foreach_add_(first, gradients, alpha=1 - beta1)
            torch._foreach_mul_(second, _unless(found_inf, beta2, 1.0))
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

            t = torch.stack(steps).double() + 1  # in fp32 the first 1 - 0.999^t would be off by 1e-5 of itself
            spread = torch._foreach_sqrt(second)
            torch._foreach_div_(spread, (1 - beta2**t).sqrt().float().unbind())
            torch._foreach_add_(spread, group["eps"])
            updates = torch._foreach_div(first, (1 - beta1**t).float().unbind())
            torch._foreach_div_(updates, spread)
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            _scale_by_trust(params, weights, updates, 1.0)
            torch._foreach_mul_(updates, _unless(found_inf, -group["lr"], 0.0))
            torch._foreach_add_(weights, updates)
            torch._foreach_add_(steps, _unless(found_inf, 1.0, 0.0))


def own_parts(tensors: Iterable[Any]) -> list[Tensor]:
    """What this rank holds of each, sharing memory: all of a plain tensor, its shard of a DTensor."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def state_of(optimizer: Optimizer, params: Sequence[Tensor], name: str) -> list[Tensor]:
    """The moment `name` of each parameter; zeros where it has none yet."""
    for p in params:
        if name not in optimizer.state[p]:
            optimizer.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return [optimizer.state[p][name] for p in params]


def _scale_by_trust(
    params: Sequence[Tensor], weights: Sequence[Tensor], updates: Sequence[Tensor], coefficient: float
) -> None:
    """Multiplies each update by coefficient * |weight| / |update|, by 1 where either is 0 or the weight a vector."""
    layers = [i for i, p in enumerate(params) if p.ndim > 1]
    if not layers:
        return
    scaled = [updates[i] for i in layers]
    lengths = torch.stack(torch._foreach_norm([weights[i] for i in layers] + scaled))
    if hasattr(params[0], "device_mesh"):
        lengths = lengths.square()
        torch.distributed.all_reduce(lengths, group=params[0].device_mesh.get_group())
        lengths = lengths.sqrt()
    weight, update = lengths.chunk(2)
    ratios = torch.where((weight > 0) & (update > 0), coefficient * weight / update, 1.0)
    torch._foreach_mul_(scaled, ratios.unbind())


def _unless(found_inf: Tensor | None, value: float, otherwise: float) -> Any:
    """`value`, but `otherwise` where the step is left out; as a number where that is not asked."""
    return value if found_inf is None else torch.where(found_inf.reshape(()) > 0, otherwise, value)


def _zero_where(found_inf: Tensor | None, tensors: Sequence[Tensor]) -> None:
    """In place: what is infinite or NaN cannot be multiplied away."""
    if found_inf is not None:
        left_out = found_inf.reshape(()) > 0
        for tensor in tensors:
            tensor.masked_fill_(left_out, 0.0)
