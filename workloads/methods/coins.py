"""CoIns: weakly supervised representation learning with coarse labels (Xu et al., ICCV 2021, arXiv 2005.09681).

Classes that are too coarse for the task still help to find the fine ones, if the network tells single images apart at
the same time: what does well on both has bounded risk on the unknown fine task, what does well on one has not. Both
losses act on the same normalised projection q of an image.

- `instance: queue` is the released algorithm: MoCo v2 (arXiv 2003.04297) and a cosine classifier V of coarse classes.
- `instance: all` is the paper's CoIns: a classifier with a weight vector w_j for each image j of the data.
- `instance: same_class` is its CoIns_imp: that classifier tells an image from those of its coarse class only.
- `proxy_weight` adds the instance proxy loss: coarse classification by the means P_c of the w_j of each class c.

The released form is that of the code. The paper's form is from a summary of it, its body could not be read; so these
choices are ours: w_j have unit length and share q's temperature, as V does; P_c is the plain mean of them, so that it
is the longer the closer the images of a class are; the classifier sees one view. An image's coarse class is learned
when it is visited: until then it competes with nobody of `same_class` and has no part in P_c, which concerns the first
epoch. The paper's loss has coarse_weight 1 and its lambda_I as `instance_weight`.

Images without a label have no coarse loss (they count in its mean, as 0) and are told from all others. As in MoCo v2
here, keys are not shuffled, BatchNorm goes by the batch of all ranks, and the slow copy moves after a step. Biases
and norms do not decay; V and w_j do.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.parts.crop import MoCoCrop
from workloads.parts.ema import copy_of, follow
from workloads.parts.gather import Waiting
from workloads.parts.heads import Tower, mlp
from workloads.parts.infonce import masked_info_nce
from workloads.parts.precision import full_precision
from workloads.parts.queue import Queue
from workloads.parts.queue_infonce import queue_info_nce


class CoInsConfig(MethodConfig):
    coarse: tuple[int, ...] | None = None  # coarse class of each label, 0 to C - 1; None: labels are coarse already
    instance: Literal["queue", "all", "same_class"] = "queue"  # code
    coarse_weight: float = Field(default=0.5, ge=0)  # w, code
    instance_weight: float = Field(default=1.0, ge=0)  # code; lambda_I in the paper
    proxy_weight: float = Field(default=0.0, ge=0)  # code has none
    dim: int = Field(default=128, ge=1)  # of q, code, as what follows
    queue: int = Field(default=65536, ge=1)  # keys
    temperature: float = Field(default=0.2, gt=0)  # of every softmax
    momentum: float = Field(default=0.999, ge=0, le=1)
    view: MoCoCrop = MoCoCrop()

    @field_validator("coarse")
    @classmethod
    def _without_gaps(cls, coarse: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if coarse is not None and set(coarse) != set(range(max(coarse, default=0) + 1)):
            raise ValueError(
                f"got coarse classes {sorted(set(coarse))}, expected 0 to C - 1, each of them; number them anew"
            )
        return coarse

    @model_validator(mode="after")
    def _proxies_have_instances(self) -> Self:
        if self.proxy_weight and self.instance == "queue":
            raise ValueError(
                f"got proxy_weight={self.proxy_weight} with instance: queue, which has no weights of instances; "
                "use instance: all or same_class"
            )
        return self


class CoIns(Method):
    Config = CoInsConfig
    paper: ClassVar[str] = (
        "CoIns: Weakly Supervised Representation Learning with Coarse Labels, Xu et al. 2021, arXiv 2005.09681"
    )
    config: CoInsConfig

    def __init__(self, config: CoInsConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        inputs.data.expect_labels()
        coarse = coarse_of_labels(config.coarse, inputs.data.num_classes)
        encoder: Any = inputs.encoder
        width = encoder.num_features
        self.query = Tower(encoder, mlp(width, width, config.dim))
        self.queue = self.instances = None
        if config.instance == "queue":
            self.key = copy_of(self.query)
            self.queue = Queue(config.queue, config.dim)
        else:
            inputs.data.expect_index()
            self.instances = Instances(inputs.data.num_instances, config.dim)
        self.register_buffer("coarse", torch.tensor(coarse))
        self.V = nn.Parameter(torch.empty(config.dim, max(coarse) + 1))  # last: before it, all is drawn as in MoCo v2
        nn.init.kaiming_uniform_(self.V, a=math.sqrt(5))  # its fan is C, as in the code

    @classmethod
    def views(cls, config: CoInsConfig, image_size: Size) -> dict[str, View]:
        view = View(size=image_size, **config.view.model_dump())
        return {"image": view, "other": view} if config.instance == "queue" else {"image": view}

    def forward(self, batch: Batch, progress: Progress) -> Output:
        config, T = self.config, self.config.temperature
        q = self.query(batch["image"])
        label = batch["label"]
        c = torch.where(label < 0, -1, self.get_buffer("coarse")[label.clamp(min=0)])  # [B]
        proxy = q.new_zeros(())
        if self.instances is None:
            assert self.queue is not None
            with torch.no_grad():
                k = self.key(batch["other"])
            losses, right = queue_info_nce(q, k, self.queue.rows, T)
            self.queue.put(k)
        else:
            index = batch["index"]
            logits = self.instances.logits(q, index, c if config.instance == "same_class" else None, T)
            losses, right = F.cross_entropy(logits, index, reduction="none"), logits.argmax(dim=1) == index
            if config.proxy_weight:
                proxy = self.instances.proxy_loss(q, c, self.V.shape[1], T)
            self.instances.put(index, c)
        instance = losses.mean()
        scores = coarse_logits(q, self.V, T)
        coarse = F.cross_entropy(scores, c, ignore_index=-1, reduction="none").mean()
        loss = config.instance_weight * instance + config.coarse_weight * coarse + config.proxy_weight * proxy
        metrics = {"instance": instance, "coarse": coarse, "proxy": proxy}
        metrics |= {"coarse_top1": (scores.argmax(dim=1) == c).float().mean()}
        metrics |= {"instance_top1": right.float().mean()}
        return Output(loss, {name: value.detach() for name, value in metrics.items()})

    def after_step(self, progress: Progress) -> None:
        if self.queue is not None:
            follow(self.key, self.query, self.config.momentum)
            self.queue.turn()
        if self.instances is not None:
            self.instances.turn()

    def export(self) -> nn.Module:
        return self.query.encoder


class Instances(nn.Module):
    """A weight vector for each image of the data, [N, D], and its coarse class as far as it was seen, -1 before."""

    classes: Tensor

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))
        self.register_buffer("classes", torch.full((count,), -1))
        self._waiting = Waiting()

    def logits(self, q: Tensor, index: Tensor, c: Tensor | None, temperature: float) -> Tensor:
        """<q, w_j> / T for all j, [B, N]; with coarse classes c [B], next to nothing for images j of another one."""
        with full_precision(q.device):
            logits = q @ F.normalize(self.weight, dim=1).T / temperature
        if c is None:
            return logits
        other = (self.classes != c[:, None]) & (c >= 0)[:, None]
        own = index[:, None] == torch.arange(len(self.weight), device=index.device)
        return logits.masked_fill(other & ~own, torch.finfo(logits.dtype).min)

    def proxy_loss(self, q: Tensor, c: Tensor, count: int, temperature: float) -> Tensor:
        """Cross-entropy of q with the means P of `count` classes; classes without a known image take no part."""
        seen = torch.where(self.classes < 0, count, self.classes)  # [N]; those unknown are put aside
        sums = q.new_zeros(count + 1, q.shape[1]).index_add(0, seen, F.normalize(self.weight, dim=1))
        sizes = q.new_zeros(count + 1).index_add(0, seen, torch.ones_like(seen, dtype=q.dtype))
        P = sums[:count] / sizes[:count, None].clamp(min=1)  # [C, D]
        with full_precision(q.device):
            logits = q @ P.T / temperature
        right = c[:, None] == torch.arange(count, device=c.device)
        return masked_info_nce(logits, right, (sizes[:count] == 0).expand_as(logits)).mean()

    def put(self, index: Tensor, c: Tensor) -> None:
        """Keeps the coarse classes [B] of images [B] of this rank for `turn`."""
        if self.training:
            self._waiting.put(index, c)

    def turn(self) -> None:
        """Notes those of all ranks; to be called in `after_step`."""
        if columns := self._waiting.take():
            index, c = columns
            self.classes[index] = c


def coarse_logits(q: Tensor, V: Tensor, temperature: float) -> Tensor:
    """Cosine of q [B, D], of unit length, with the columns of V [D, C], over T: [B, C]."""
    with full_precision(q.device):
        return q @ F.normalize(V, dim=0) / temperature


def coarse_of_labels(coarse: tuple[int, ...] | None, num_classes: int) -> list[int]:
    """The coarse class of each label.

    Raises:
        ValueError: some have no coarse class.
    """
    if coarse is not None and len(coarse) < num_classes:
        raise ValueError(
            f"got `coarse` for {len(coarse)} of {num_classes} labels, expected a coarse class for each; "
            f"add those of labels {len(coarse)} to {num_classes - 1}"
        )
    return list(range(num_classes)) if coarse is None else list(coarse)
