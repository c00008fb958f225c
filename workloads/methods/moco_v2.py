"""MoCo v2: improved baselines with momentum contrastive learning (Chen, Fan, Girshick and He 2020, arXiv 2003.04297).

The query of one view should be most like the key of the other view of its image, unlike the keys of thousands of other
images, which a queue remembers of earlier steps. Keys come from a slow copy of the network (MoCo, He et al. 2020,
arXiv 1911.05722, algorithm 1).

Where BatchNorm sees the keys of one worker together, queries could be matched by its statistics; the released code
shuffles the batch over workers for keys, here BatchNorm goes by the batch of all of them (`engine.sync_batchnorm`,
the default), for both. On one worker neither helps, as in the paper. The slow copy moves after a step rather than at
the beginning of the next one, which is the same. Biases and norms do not decay, those of the code do; the cosine of
the rate falls with each step, that of the code with each epoch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.parts.crop import MoCoCrop
from workloads.parts.ema import copy_of, follow
from workloads.parts.heads import Tower, mlp
from workloads.parts.queue import Queue
from workloads.parts.queue_infonce import queue_info_nce


class MoCoV2Config(MethodConfig):
    dim: int = Field(default=128, ge=1)
    queue: int = Field(default=65536, ge=1)  # keys
    temperature: float = Field(default=0.2, gt=0)  # table 1
    momentum: float = Field(default=0.999, ge=0, le=1)
    view: MoCoCrop = MoCoCrop()


class MoCoV2(Method):
    Config = MoCoV2Config
    paper: ClassVar[str] = (
        "MoCo v2: Improved Baselines with Momentum Contrastive Learning, Chen et al. 2020, arXiv 2003.04297"
    )
    config: MoCoV2Config

    def __init__(self, config: MoCoV2Config, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        encoder: Any = inputs.encoder
        width = encoder.num_features
        self.query = Tower(encoder, mlp(width, width, config.dim))
        self.key = copy_of(self.query)
        self.queue = Queue(config.queue, config.dim)

    @classmethod
    def views(cls, config: MoCoV2Config, image_size: Size) -> dict[str, View]:
        view = View(size=image_size, **config.view.model_dump())
        return {"image": view, "other": view}

    def forward(self, batch: Batch, progress: Progress) -> Output:
        q = self.query(batch["image"])
        with torch.no_grad():
            k = self.key(batch["other"])
        loss, right = queue_info_nce(q, k, self.queue.rows, self.config.temperature)
        self.queue.put(k)
        return Output(loss.mean(), {"contrast_top1": right.float().mean()})

    def after_step(self, progress: Progress) -> None:
        follow(self.key, self.query, self.config.momentum)
        self.queue.turn()

    def export(self) -> nn.Module:
        return self.query.encoder
