"""LOOK: rethinking supervised pre-training for better downstream transferring (Feng et al., ICLR 2022).

arXiv 2110.06014, leave-one-out k nearest neighbours. Cross-entropy and SupCon draw all images of a class to one place
and so lose what tells them apart. Here only most of the k nearest neighbours of an image have to be of its class, so
that a class may lie in several places. Neighbours are looked for among features of earlier steps, which a queue
remembers with their labels; they come from a slow copy of the network (MoCo, He et al. 2020, arXiv 1911.05722).

From the paper's abstract and a summary of it: neither its body nor code could be read. So ours are

- the rule for an image that has nobody of its class among its k nearest: the most similar one of its class in the
  queue joins them; where the queue has none, the image has no loss and the mean is over the others, of all ranks
  (with micro-batches it is over those of each micro-batch of all ranks, so leave `micro_batch_size` unset);
- the augmentation, which is that of MoCo v2, and every default that says so;
- what an image is compared with: the queue alone, without the other images of its batch.

Other features of the image itself are left out by its index in the data, however long ago they came. Images without
a label fill the queue but are neighbours of nobody. In the first step of a run the queue is empty, so its loss is 0.
The slow copy moves after a step rather than at the beginning of the next one, which is the same.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.parts.crop import MoCoCrop
from workloads.parts.ema import copy_of, follow
from workloads.parts.gather import shares
from workloads.parts.heads import Tower, mlp
from workloads.parts.infonce import masked_info_nce
from workloads.parts.precision import full_precision
from workloads.parts.queue import Queue


class LOOKConfig(MethodConfig):
    k: int = Field(default=400, ge=1)  # ours: of the paper's only "several hundred" is known
    queue: int = Field(default=65536, ge=1)  # features; as in MoCo
    temperature: float = Field(default=0.1, gt=0)  # ours
    momentum: float = Field(default=0.999, ge=0, le=1)  # as in MoCo
    dim: int = Field(default=128, ge=1)  # as in MoCo
    layers: int = Field(default=2, ge=1)  # of the head, ours; the paper compares several: the head overfits instead
    view: MoCoCrop = MoCoCrop()

    @model_validator(mode="after")
    def _neighbours_fit(self) -> Self:
        if self.k > self.queue:
            raise ValueError(f"got k={self.k} neighbours of a queue of {self.queue}, expected k <= queue; lower k")
        return self


class LOOK(Method):
    Config = LOOKConfig
    paper: ClassVar[str] = (
        "LOOK: Rethinking Supervised Pre-training for Better Downstream Transferring, Feng et al. 2022, "
        "arXiv 2110.06014"
    )
    config: LOOKConfig

    def __init__(self, config: LOOKConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        inputs.data.expect_labels()
        inputs.data.expect_index()
        encoder: Any = inputs.encoder
        width = encoder.num_features
        self.query = Tower(encoder, mlp(*[width] * config.layers, config.dim))
        self.key = copy_of(self.query)
        self.queue = Queue(config.queue, config.dim, tags=("label", "index"))

    @classmethod
    def views(cls, config: LOOKConfig, image_size: Size) -> dict[str, View]:
        view = View(size=image_size, **config.view.model_dump())
        return {"image": view, "other": view}

    def forward(self, batch: Batch, progress: Progress) -> Output:
        y, index = batch["label"], batch["index"]
        z = self.query(batch["image"])
        with torch.no_grad():
            kappa = self.key(batch["other"])
        y_R, index_R = self.queue.tags["label"], self.queue.tags["index"]
        known = (y_R >= 0) & (index_R != index[:, None])  # [B, R]: leave one out
        same = known & (y_R == y[:, None])
        loss = neighbour_loss(z, self.queue.rows, same, known, self.config.k, self.config.temperature)  # [B]
        self.queue.put(kappa, label=y, index=index)
        counts = same.any(dim=1).float()
        own = counts / counts.sum().clamp(min=1)
        metrics = {"own_class": ((-loss.detach()).exp() * own).sum(), "with_neighbour": counts.mean()}
        return Output((loss * shares(counts)).sum(), metrics)

    def after_step(self, progress: Progress) -> None:
        follow(self.key, self.query, self.config.momentum)
        self.queue.turn()

    def export(self) -> nn.Module:
        return self.query.encoder


def neighbour_loss(z: Tensor, kappa: Tensor, same: Tensor, known: Tensor, k: int, temperature: float) -> Tensor:
    """-log p(y): the weight that the class of a feature has among its k nearest neighbours, by exp(<z, kappa> / tau).

    Args:
        z: [B, D] of unit length.
        kappa: [R, D] of unit length; gets no gradient.
        same: bool [B, R], of its class; part of `known`.
        known: bool [B, R], who can be a neighbour.
        k: of neighbours, fewer where fewer are known; the nearest of its class joins where it is not among them.
        temperature: tau.

    Returns:
        [B] in float32; 0, also in gradient, where nobody is of its class.
    """
    with full_precision(z.device):
        s = z.float() @ kappa.detach().T / temperature  # [B, R]
    scores = s.detach()
    nearest = scores.masked_fill(~known, -torch.inf).topk(k, dim=1).indices  # N_k, [B, k]
    nearest_same = scores.masked_fill(~same, -torch.inf).argmax(dim=1, keepdim=True)
    neighbours = torch.cat([nearest, nearest_same], dim=1)  # [B, k + 1]
    positive, excluded = same.gather(1, neighbours), ~known.gather(1, neighbours)
    there = positive[:, :k].any(dim=1, keepdim=True)
    excluded = torch.cat([excluded[:, :k], excluded[:, k:] | there], dim=1)
    return masked_info_nce(s.gather(1, neighbours), positive, excluded)
