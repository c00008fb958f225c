"""When a run cannot come to anything: its loss has run away, or its features say the same of every image.

No I/O and nothing to checkpoint: the loop hands in points of the curve and features, a guard raises.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from workloads.data.modalities import Views
from workloads.data.views import View
from workloads.methods.base import Batch, Method

FIRST_POINTS = 5  # of the curve; a loss is judged by the largest of them
POINTS_IN_A_ROW = 3
CHECKPOINTS_IN_A_ROW = 2
RANKME_EPSILON = 1e-7
MOST_SAMPLES = 256  # RankMe is at most their number; more would make the decomposition felt


class DivergenceError(RuntimeError):
    """The loss has grown far above where it began; would happen again from the same checkpoint."""

    hint = (
        "lower optimizer.lr, lengthen schedule.warmup_epochs or set optimizer.clip_grad_norm; if this loss is meant to "
        "grow, raise guards.divergence or set it to null"
    )


class CollapseError(RuntimeError):
    """The encoder gives nearly the same features for every image; would happen again."""

    hint = (
        "lower optimizer.lr and check what keeps this method from collapse (predictor, momentum, temperature, weights "
        "of its losses); if narrow features are meant, lower guards.min_feature_std and guards.min_rankme, or set them "
        "to null"
    )


class Divergence:
    """Ends a run whose loss is `factor` times the largest of its first points, three points in a row.

    Compared is the loss with the largest magnitude of the first five points that have a loss
    other than 0. Only growth above zero counts: a loss that falls below zero, however far, is
    not divergence. Once a loss below zero was seen (negative cosine similarity, log-likelihoods)
    zero is not the bottom of the scale and a small first loss means little, so the scale is then
    at least 1. Points without a finite loss say nothing: they neither count nor interrupt.
    """

    def __init__(self, factor: float | None, history: Iterable[dict[str, Any]]) -> None:
        """The guard as it stood after `history`.

        Args:
            factor: `Guards.divergence`; None: never.
            history: points of the curve up to the checkpoint that the run goes on from, in order. The curve may hold
                later ones, whose steps are made again: leave them out.
        """
        self._factor = factor
        self._first: list[float] = []
        self._signed = False
        self._above = 0
        for point in history:
            self._add(point.get("loss"))

    @property
    def _largest(self) -> float:
        """Of the first points; 0 before there is one."""
        largest = max(self._first, default=0.0)
        return max(largest, 1.0) if self._signed and largest else largest

    def _add(self, loss: float | None) -> None:
        if self._factor is None or loss is None or not math.isfinite(loss):
            return
        self._signed |= loss < 0
        if len(self._first) < FIRST_POINTS:
            self._first += [abs(loss)] if loss else []
        else:
            self._above = self._above + 1 if loss > self._factor * self._largest else 0

    @property
    def counts(self) -> bool:
        """Whether the last point was too large."""
        return self._above > 0

    def look(self, point: dict[str, Any]) -> None:
        """Takes the next point of the curve, {"step", "loss", ...}; the loss may be None.

        Raises:
            DivergenceError: this is the third point in a row that is too large.
        """
        before = self._above
        self._add(point.get("loss"))
        if self._above > before and self._above >= POINTS_IN_A_ROW:
            loss, largest = point["loss"], self._largest
            raise DivergenceError(
                f"the loss {loss:.6g} at step {point['step']} is {loss / largest:.4g} times the largest of its first "
                f"points ({largest:.4g}), three points in a row"
            )


class Collapse:
    """Ends a run whose features have deviated too little, or in one direction only, at two checkpoints in a row.

    A resumed run has forgotten the checkpoint before: it says the same a checkpoint later.
    """

    def __init__(self, min_feature_std: float | None, min_rankme: float | None = None) -> None:
        """`Guards.min_feature_std` and `Guards.min_rankme`; None: measured, but never an end."""
        self._min_std, self._min_rankme = min_feature_std, min_rankme
        self._narrow = 0

    @property
    def counts(self) -> bool:
        """Whether the last features were too narrow."""
        return self._narrow > 0

    def look(self, features: Tensor) -> dict[str, float]:
        """Measures features [B, D]; the same features give the same verdict on every rank.

        Returns:
            feature_std: mean over dimensions of the standard deviation of features at unit length, times sqrt(D):
                0 when all are alike, 1 when they spread evenly (Chen and He 2021, arXiv 2011.10566, section 4.1).
            rankme: exp of the entropy of their normalised singular values, 1 to min(B, D) (Garrido et al. 2023,
                arXiv 2210.02885, equation 1).
            Nothing for a single sample or features that are not finite, where neither means anything.

        Raises:
            CollapseError: one of them is below its least for the second time in a row; of a single dimension (D = 1)
                RankMe is always 1, and no sign.
        """
        if len(features) < 2 or not bool(features.isfinite().all()):
            return {}
        x = features.detach().double()  # lengths of float32 features can overflow float32
        unit = x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        feature_std = float(unit.std(dim=0, correction=0).mean() * x.shape[1] ** 0.5)
        measured = {"feature_std": feature_std, "rankme": rankme(x)}
        signs = []
        if self._min_std is not None and feature_std < self._min_std:
            signs.append(f"features at unit length deviate by {feature_std:.3g} of 1, less than {self._min_std:.3g}")
        if self._min_rankme is not None and measured["rankme"] < self._min_rankme and x.shape[1] > 1:
            signs.append(
                f"features span {measured['rankme']:.4g} directions (RankMe), less than {self._min_rankme:.4g}"
            )
        self._narrow = self._narrow + 1 if signs else 0
        if self._narrow >= CHECKPOINTS_IN_A_ROW:
            raise CollapseError(
                f"{' and '.join(signs)}, at {self._narrow} checkpoints in a row: the encoder has collapsed"
            )
        return measured


def rankme(features: Tensor) -> float:
    """Smooth rank of features [B, D] (Garrido et al. 2023, equation 1)."""
    sigma = torch.linalg.svdvals(features)
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + RANKME_EPSILON
    return float(torch.exp(-(p * p.log()).sum()))


def features_of(method: Method, batch: Batch, views: Views) -> Tensor | None:
    """Features float32 [B, D] of the first image view by the network that the method exports; changes nothing.

    Where there are volumes only [B, C, D, H, W], of the slice in the middle of each.

    Training modes, gradients, buffers and torch's generators are afterwards as they were. Where
    weights are shared out (FSDP) every rank calls this at the same time, within `Spread.whole`.

    Args:
        method: the one that trains.
        batch: as the method gets it; of several streams the first is looked at, of its samples at most 256.
        views: those of the method.

    Returns:
        None where the method exports no encoder or looks at neither images nor volumes.
    """
    name = _first(views, View) or _first(views, _volume_view())
    if type(method).exports != "encoder" or name is None:
        return None
    of_first = batch if len(method.streams) == 1 else batch[method.streams[0]]
    images: Tensor = of_first[name][:MOST_SAMPLES]
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    devices = [images.device] if images.device.type == "cuda" else []
    with _training_kept(method), torch.random.fork_rng(devices), torch.no_grad(), _not_compiled():
        model: nn.Module = method.export()
        with _training_kept(model):
            features: Tensor = model.eval()(images)
    return features.float()


def _first(views: Views, kind: type) -> str | None:
    return next((name for name, view in views.items() if isinstance(view, kind)), None)


def _volume_view() -> type:
    from workloads.data.transforms.volume import VolumeView  # nibabel costs what it costs only here

    return VolumeView


@contextlib.contextmanager
def _training_kept(module: nn.Module) -> Iterator[None]:
    """Puts back the mode of each part, which need not be that of the whole: a frozen teacher stays in eval mode."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _not_compiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled blocks run as Python: another mode and batch size would compile them again, for minutes."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it costs a second
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
