"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) as timm combines them, with label smoothing."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from workloads.data.keys import uniform

BETA_TRIES = 12  # a draw is accepted with probability above 0.95


class Mixing(BaseModel):
    """How samples and their labels are mixed; by default as in fine-tuning of MAE (He et al. 2022, table 9).

    Attributes:
        mixup_alpha: the share of a sample in mixup is drawn from Beta(alpha, alpha); 0 is no mixup.
        cutmix_alpha: the same of CutMix; 0 is no CutMix.
        p: probability that anything is mixed.
        switch_p: probability of CutMix where both are possible.
        smoothing: of the labels: this much is spread evenly over all classes.
        mode: whether one draw counts for the whole "batch", or each "elem" has its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mixup_alpha: float = Field(default=0.8, ge=0, allow_inf_nan=False)
    cutmix_alpha: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    p: float = Field(default=1.0, ge=0, le=1)
    switch_p: float = Field(default=0.5, ge=0, le=1)
    smoothing: float = Field(default=0.1, ge=0, le=1)
    mode: Literal["batch", "elem"] = "batch"


def apply(
    mixing: Mixing, images: Tensor, labels: Tensor, num_classes: int, keys: Tensor, salt: str
) -> tuple[Tensor, Tensor]:
    """Mixes each sample with its partner: the one at its place in the reversed batch.

    In the mode "elem", what is drawn for a sample (mixup or CutMix, share, box) depends on its key alone; only who is
    its partner depends on the batch. In the mode "batch" the key of the first sample draws for all, so everything
    depends on the batch, and another micro-batch or number of ranks is another mixture.

    Args:
        mixing: what may be drawn.
        images: float [B, ..., H, W], normalised or not, on any device; they are not changed in place.
        labels: int64 [B] in [0, num_classes).
        num_classes: C.
        keys: int64 [B], the randomness of each sample, on any device; numbers are drawn there.
        salt: makes two mixtures of one sample independent.

    Returns:
        The images, and targets float32 [B, C] whose rows sum to 1.
    """
    assert images.is_floating_point(), f"bytes cannot be mixed without rounding: got {images.dtype}"
    H, W = images.shape[-2:]
    own, box = (drawn.to(images.device) for drawn in draw(mixing, keys, (H, W), salt))
    share = own.float()
    pasted = (box[:, 2] > 0)[:, None, None]
    weight = torch.where(pasted, (~_inside(box, H, W)).float(), share[:, None, None])
    weight = weight.reshape(len(images), *[1] * (images.ndim - 3), *weight.shape[1:]).to(images.dtype)
    targets = F.one_hot(labels.to(images.device), num_classes) * (1 - mixing.smoothing) + mixing.smoothing / num_classes
    return torch.lerp(images.flip(0), images, weight), torch.lerp(targets.flip(0), targets, share[:, None])


def draw(mixing: Mixing, keys: Tensor, size: tuple[int, int], salt: str) -> tuple[Tensor, Tensor]:
    """Draws the share and the box of each sample.

    Args:
        mixing: what may be drawn.
        keys: int64 [B].
        size: height and width of the images in pixels.
        salt: see `apply`.

    Returns:
        The share of a sample that remains its own, float64 [B], and the box taken from its partner as int64 [B, 4]
        (left, top, right, bottom in pixels), all zero where nothing is cut.
    """
    if mixing.mode == "batch":
        own, box = draw(mixing.model_copy(update={"mode": "elem"}), keys[:1], size, salt)
        return own.expand(len(keys)), box.expand(len(keys), 4)
    u = uniform(keys, 4, f"{salt}/mixing")
    mixed = (u[:, 0] < mixing.p) & (mixing.mixup_alpha + mixing.cutmix_alpha > 0)
    cut = u[:, 1] < (mixing.switch_p if mixing.mixup_alpha and mixing.cutmix_alpha else float(mixing.cutmix_alpha > 0))
    by_mixup, by_cutmix = (
        beta(alpha, keys, f"{salt}/{name}") if alpha else torch.ones_like(u[:, 0])
        for alpha, name in ((mixing.mixup_alpha, "mixup"), (mixing.cutmix_alpha, "cutmix"))
    )
    own = torch.where(mixed, torch.where(cut, by_cutmix, by_mixup), 1.0)
    # The box covers 1 - own of the area, but part of it may lie outside; then the share is corrected.
    side = torch.tensor(size[::-1], dtype=torch.float64, device=keys.device)
    extent = (side * (1 - own).sqrt()[:, None]).floor()
    centre = (side * u[:, 2:]).floor()
    low, high = centre - (extent / 2).floor(), centre + ((extent + 1) / 2).floor()
    box = torch.cat([low, high], dim=1).clamp(min=0).minimum(side.repeat(2)).long()
    area = (box[:, 2:] - box[:, :2]).prod(dim=1)
    return torch.where(cut, 1 - area / side.prod(), own), box * cut[:, None]


def _inside(box: Tensor, H: int, W: int) -> Tensor:
    """int64 [B, 4] -> bool [B, H, W]."""
    left, top, right, bottom = box[:, :, None, None].unbind(1)
    x = torch.arange(W, device=box.device)[None, None, :]
    y = torch.arange(H, device=box.device)[None, :, None]
    return (left <= x) & (x < right) & (top <= y) & (y < bottom)


def beta(alpha: float, keys: Tensor, salt: str) -> Tensor:
    """Draws from Beta(alpha, alpha) by keys int64 [B] -> float64 [B] in [0, 1]."""
    # A share of two gamma variables; of logarithms, since for a small alpha the variables themselves underflow.
    return torch.sigmoid(_log_gamma(alpha, keys, f"{salt}/first") - _log_gamma(alpha, keys, f"{salt}/second"))


def _log_gamma(alpha: float, keys: Tensor, salt: str) -> Tensor:
    """Logarithms of draws from Gamma(alpha, 1), by the method of Marsaglia and Tsang (2000) -> float64 [B]."""
    u = uniform(keys, 2 * BETA_TRIES + 1, salt).clamp(min=2.0**-54)  # of 0 the logarithm is infinite
    normal, accept = torch.special.ndtri(u[:, :BETA_TRIES]), u[:, BETA_TRIES:-1]
    d = alpha + 1 - 1 / 3  # the method needs a shape of at least 1: it draws for alpha + 1
    cube = (1 + normal / (9 * d) ** 0.5) ** 3
    log_cube = cube.clamp(min=1e-300).log()
    accepted = (cube > 0) & (accept.log() < normal.square() / 2 + d * (1 - cube + log_cube))
    first = accepted.int().argmax(dim=1, keepdim=True)
    return math.log(d) + log_cube.gather(1, first)[:, 0] + u[:, -1].log() / alpha
