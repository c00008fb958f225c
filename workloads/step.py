"""One optimizer step: micro-batches, precision, the length of the gradient, and what is not finite.

Nothing here waits for the device: a step that must change nothing is left out by the
optimizer itself (`found_inf`), and what happened is read when a point of the curve is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workloads.batches import micro_batches
from workloads.data.keys import mix_int
from workloads.methods.base import Batch, Progress
from workloads.parallel import Spread
from workloads.parts.lars_lamb import own_parts
from workloads.ranks import Ranks
from workloads.spec import JobSpec

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Done:
    """What a step reports; tensors stay on the device.

    Attributes:
        loss: mean over the micro-batches of this rank; None where there was nothing to differentiate.
        metrics: of the last micro-batch, and `grad_norm`, over all ranks.
        skipped: 1 where loss or gradient was not finite, so that the weights stayed as they were.
        alone: the two moments between which this rank worked by itself, before gradients were exchanged: ranks differ
            in it, and wait for the slowest. A forward that waits for other ranks itself hides that: of FSDP, of
            SyncBatchNorm, of a loss over the features of all ranks.
    """

    loss: Tensor | None
    metrics: dict[str, Tensor]
    skipped: Tensor
    alone: tuple[Moment, Moment]


Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """The present moment in the work of the device; of a GPU one to come, since calls return before they are done."""
    if device.type != "cuda":
        return time.perf_counter()
    moment = torch.cuda.Event(enable_timing=True)
    moment.record()
    return moment


def seconds_between(began: Moment, ended: Moment) -> float:
    """Of two moments of one device, of which a GPU is waited for."""
    if isinstance(began, float) or isinstance(ended, float):
        return ended - began  # type: ignore[operator]
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


class LossScale:
    """fp16 loses small gradients: the loss is multiplied before backward (Micikevicius et al. 2018, arXiv 1710.03740).

    Doubled after 2,000 good steps in a row, halved after a bad one.
    """

    INTERVAL = 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.tensor(2.0**16, device=device)
        self.good = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        self.good = (self.good + 1) * (1 - skipped)
        grows = self.good >= self.INTERVAL
        self.value = torch.where(skipped > 0, self.value * 0.5, torch.where(grows, self.value * 2, self.value))
        self.good = torch.where(grows, torch.zeros_like(self.good), self.good)


class Stepper:
    """Makes the optimizer steps of one rank."""

    def __init__(
        self,
        spec: JobSpec,
        model: Spread,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        forwarded: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes no step yet.

        Args:
            spec: the job.
            model: the method, spread over the ranks.
            optimizer: of its parameters.
            ranks: this process among those of the job.
            forwarded: called before each backward, which leaves the interpreter to other threads.
        """
        self._spec, self._model, self._optimizer, self._ranks = spec, model, optimizer, ranks
        self._forwarded = forwarded
        self._n = spec.accumulation_on(ranks.world_size)
        self._scale = LossScale(ranks.device) if spec.precision == "fp16" else None
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms = [module for module in model.method.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        self._running = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
        self.skipped_in_a_row = torch.zeros((), device=ranks.device)
        self.worst_row = torch.zeros((), device=ranks.device)

    def __call__(self, streams: dict[str, Batch], progress: Progress) -> Done:
        """Forward and backward over the micro-batches of `streams`, then a step of the optimizer."""
        parts = {name: micro_batches(batch, self._n) for name, batch in streams.items()}
        running = [statistic.clone() for statistic in self._running]  # which the forward moves
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        began = now(self._ranks.device)
        for i in range(self._n):
            batch: dict[str, Any] = {name: batches[i] for name, batches in parts.items()}
            seed_micro_batch(self._spec.seed, progress.step, self._ranks.rank * self._n + i, self._ranks.device)
            with self._model.averaging(i == self._n - 1):
                output = self._forward(batch if len(batch) > 1 else next(iter(batch.values())), progress)
                metrics = output.metrics
                alone = began, now(self._ranks.device)
                self._forwarded()
                if output.loss is not None:
                    losses.append(output.loss.detach())
                    # Times 1, or NaN: a loss that is not finite makes the gradient so, by which every rank knows of it.
                    loss = output.loss * (1 + 0 * losses[-1])
                    if self._scale is not None:
                        loss = loss * self._scale.value
                    (loss / self._n).backward()
        if not losses:
            self._optimizer.zero_grad(set_to_none=True)
            return Done(None, metrics, torch.zeros((), device=self._ranks.device), alone)
        norm, skipped = self._update()
        for statistic, before in zip(self._running, running, strict=True):
            statistic.copy_(torch.where(skipped > 0, before, statistic))
        return Done(torch.stack(losses).mean(), metrics | {"grad_norm": norm}, skipped, alone)

    def _forward(self, batch: Batch, progress: Progress) -> Any:
        dtype = AUTOCAST.get(self._spec.precision)
        with torch.autocast(self._ranks.device.type, dtype, enabled=dtype is not None):
            return self._model(batch, progress)

    def _update(self) -> tuple[Tensor, Tensor]:
        """The step of the optimizer -> length of the gradient, and whether the step was left out."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = self._model.norm(gradients)
        factor = None
        if self._scale is not None:
            factor = 1 / self._scale.value
            norm = norm * factor
        skipped = (~norm.isfinite()).float()
        if (longest := self._spec.optimizer.clip_grad_norm) is not None:
            shorten = (longest / (norm + 1e-6)).clamp(max=1.0)
            factor = shorten if factor is None else factor * shorten
        if factor is not None:
            torch._foreach_mul_(own_parts(gradients), factor)
        if (longest := self._spec.optimizer.clip_parameter_norm) is not None:
            self._model.clip_each(gradients, longest)
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]  # torch's own name; weights stay where it is 1
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._scale is not None:
            self._scale.update(skipped)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        self.worst_row = torch.maximum(self.worst_row, self.skipped_in_a_row)
        return norm, skipped

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside weights and optimizer."""
        state = {"skipped_in_a_row": self.skipped_in_a_row}
        return state if self._scale is None else state | {"scale": self._scale.value, "good": self._scale.good}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        device = self._ranks.device
        self.skipped_in_a_row = state["skipped_in_a_row"].to(device)
        if self._scale is not None and "scale" in state:
            self._scale.value, self._scale.good = state["scale"].to(device), state["good"].to(device)


def seed_micro_batch(seed: int, step: int, micro_batch: int, device: torch.device) -> None:
    """Seeds torch by the global number of the micro-batch: 1 rank with 8 of them draws what 8 ranks with 1 draw."""
    draw = mix_int(mix_int(mix_int(seed) + step) + micro_batch) & (2**63 - 1)
    torch.default_generator.manual_seed(draw)  # `torch.manual_seed` takes a millisecond where no GPU is in use
    if device.type == "cuda":
        torch.cuda.manual_seed_all(draw)
