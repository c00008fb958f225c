"""Self-distillation with a slow teacher, centred and sharpened (DINO, Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from workloads.models.vit import Block
from workloads.parts.ema import copy_of
from workloads.parts.gather import Waiting

M = TypeVar("M", bound=nn.Module)


def teacher_of(student: M) -> M:
    """An equal network that nothing trains and that never drops a path: ours and timm's."""
    teacher = copy_of(student)
    for part in teacher.modules():
        if isinstance(part, Block):
            part.drop_path = 0.0
        elif type(part).__name__ == "DropPath":  # of timm, which is not imported for it
            part.drop_prob = 0.0  # type: ignore[assignment]
    return teacher


def teacher_temperature(epoch: int, first: float, last: float, warmup_epochs: int) -> float:
    """From `first` in epoch 0 linearly to `last` in the last epoch of the warm-up, and on; constant within an epoch."""
    if epoch >= warmup_epochs:
        return last
    return first + (last - first) * epoch / max(warmup_epochs - 1, 1)


def sharpened(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """What the teacher says: P = softmax((g - c) / tau) of logits [..., K], in float32 and without gradient."""
    return ((logits.detach().float() - centre) / temperature).softmax(dim=-1)


def cross_view_entropy(targets: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """Mean over pairs (a, b), b not the crop that a is of, of the cross-entropy of target a and crop b.

    Args:
        targets: of the teacher, distributions [B, K]; target i is of crop i.
        logits: of the student for each crop [B, K], divided by its temperature; two or more.

    Returns:
        A scalar in float32.
    """
    log_p = [x.float().log_softmax(dim=-1) for x in logits]
    pairs = [-(p * q).sum(dim=-1).mean() for a, p in enumerate(targets) for b, q in enumerate(log_p) if a != b]
    return torch.stack(pairs).mean()


def entropy(targets: Tensor) -> Tensor:
    """Mean entropy of distributions [..., K] in nats: log K where all say nothing, 0 where each names one place.

    With a divergence of 0 to the student, either is a collapse (section 5.3).
    """
    return torch.special.entr(targets).sum(dim=-1).mean()


def distil(
    g_t: Tensor, g_s: Tensor, centre: Centre, *, teacher_temperature: float, student_temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and what tells a collapse; the centre keeps the teacher's logits for its next turn.

    Args:
        g_t: of the teacher for two crops of B images, [2 * B, K].
        g_s: of the student for V crops, those two first, [V * B, K].
        centre: of the teacher's logits.
        teacher_temperature: tau_t.
        student_temperature: tau_s.
    """
    P_t = sharpened(g_t, centre.value, teacher_temperature)
    crops = 2 * len(g_s) // len(g_t)
    loss = cross_view_entropy(P_t.chunk(2), (g_s.float() / student_temperature).chunk(crops))
    centre.put(g_t)
    h = entropy(P_t)
    return loss, {"teacher_entropy": h, "kl": loss.detach() - h}  # H(P_t, P_s) = h(P_t) + KL(P_t | P_s)


class Centre(nn.Module):
    """A running mean of the teacher's logits, which keeps any one of the K places from winning always (equation 4).

    Equal on all ranks, and part of the checkpoint. Means are put in by `put` for each micro-batch and taken over by
    `turn` once in a step: so a step sees one centre, however its batch was divided.

    Attributes:
        value: c [K], zeros at first.
    """

    value: Tensor

    def __init__(self, out_dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(out_dim))
        self._waiting = Waiting()

    def put(self, logits: Tensor) -> None:
        """Keeps the mean of logits [N, K] of this rank for `turn`; N is that of all micro-batches."""
        if self.training:
            self._waiting.put(logits.detach().float().mean(dim=0, keepdim=True))

    @torch.no_grad()
    def turn(self) -> None:
        """Moves to c <- m c + (1 - m) mean of the batch of all ranks; to be called in `after_step`."""
        for means in self._waiting.take():  # one column, or none where nothing was put
            self.value.lerp_(means.mean(dim=0), 1 - self.momentum)
