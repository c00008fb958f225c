"""DenseCL: dense contrastive learning for self-supervised visual pre-training (Wang et al., CVPR 2021).

arXiv 2011.09157. MoCo v2 twice (Chen et al. 2020, arXiv 2003.04297): as it is on pooled features, and on the maps
before pooling. Each place of one view belongs to the place of the other view whose feature of the backbone is most
like its own; behind a dense head the two should be alike, unlike the means of other images that a second queue holds.

Differences from the released code. Where it shuffles keys over workers, BatchNorm goes by the batch of all of them
(`engine.sync_batchnorm`, the default), for queries and keys. The slow copy moves after a step rather than at the
beginning of the next one, which is the same. With a `grid`, the map of the backbone is pooled to it before its places
are matched; the code matches those of the whole map, so it can have none. Matching is in float64, which autocast
leaves alone: in bfloat16, places that are nearly alike would tie. A batch need not divide the queues. Biases and norms
do not decay; the cosine of the rate falls with each step, that of the code with each epoch. In the warm-up the dense
loss is multiplied by 0 rather than left out, so each parameter has a gradient; by default there is no warm-up, as in
the released configs, while the class that the code has for it says 1000 steps.

Any network whose maps or patches form a square will do. The paper has ResNets only; the pooled feature of a ViT is
the mean of its patches.
"""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.parts.crop import MoCoCrop
from workloads.parts.ema import copy_of, follow
from workloads.parts.feature_maps import dense_features
from workloads.parts.heads import mlp
from workloads.parts.patches import patchify, unpatchify
from workloads.parts.queue import Queue
from workloads.parts.queue_infonce import queue_info_nce


class DenseCLConfig(MethodConfig):
    """Defaults are those of the released configs, which are the same for ImageNet and COCO."""

    dim: int = Field(default=128, ge=1)  # of what both heads give
    queue: int = Field(default=65536, ge=1)  # keys of each of the two
    temperature: float = Field(default=0.2, gt=0)
    momentum: float = Field(default=0.999, ge=0, le=1)
    dense_weight: float = Field(default=0.5, ge=0, le=1)  # lambda
    warmup_steps: int = Field(default=0, ge=0)  # in which lambda is 0; an option of the code
    grid: int | None = Field(default=None, ge=1)  # S; None: the whole map, 7 of a ResNet at 224 px
    view: MoCoCrop = MoCoCrop()


def match(b_q: Tensor, b_k: Tensor) -> Tensor:
    """Features of the backbone [B, C, S] -> c: int64 [B, S], for each place of the query the most like one of the key.

    Args:
        b_q: of the query; their lengths do not matter.
        b_k: of the key.
    """
    with torch.no_grad():
        b_q, b_k = (F.normalize(b.double(), dim=1) for b in (b_q, b_k))
        return (b_q.mT @ b_k).argmax(dim=2)


def dense_pairs(d_q: Tensor, d_k: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The dense features of each place and of the one that it is matched with, two times [B * S, D] of unit length.

    Args:
        d_q: of the query, [B, D, S]; rows need not be normalised.
        d_k: of the key.
        c: of `match`.
    """
    own = d_k.gather(2, c[:, None].expand(-1, d_k.shape[1], -1))  # of the same image
    q, k = (F.normalize(d.float(), dim=1).transpose(1, 2).flatten(0, 1) for d in (d_q, own))
    return q, k


class Tower(nn.Module):
    """Backbone, global head and dense head."""

    def __init__(self, encoder: nn.Module, config: DenseCLConfig, image_size: int) -> None:
        super().__init__()
        with torch.no_grad():
            probe = copy.deepcopy(encoder).to("meta").eval()
            b, pooled = dense_features(probe, torch.empty(1, 3, image_size, image_size, device="meta"))
        (_, C, h, _), width = b.shape, pooled.shape[1]
        if h == 1:
            raise ValueError(
                f"got maps of 1 x 1 for images of {image_size} pixels, expected several places to match; use larger "
                "images or a network of smaller stride, such as resnet_cifar"
            )
        if config.grid is not None and config.grid > h:
            raise ValueError(f"got grid={config.grid} for maps of {h} x {h}, expected at most {h}; leave it out")
        self.encoder = encoder
        self.projector = mlp(width, width, config.dim)
        self.dense_projector = nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(), nn.Conv2d(C, config.dim, 1))
        self.pool = nn.Identity() if config.grid is None else nn.AdaptiveAvgPool2d(config.grid)
        for part in self.projector:  # code; convolutions are left as torch draws them
            if isinstance(part, nn.Linear):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W] -> backbone [B, C, S * S], global [B, D], dense [B, D, S * S]; none of them normalised."""
        b, pooled = dense_features(self.encoder, images)
        b = self.pool(b)
        return b.flatten(2), self.projector(pooled), self.dense_projector(b).flatten(2)


class DenseCL(Method):
    Config = DenseCLConfig
    paper: ClassVar[str] = (
        "DenseCL: Dense Contrastive Learning for Self-Supervised Visual Pre-Training, Wang et al. 2021, "
        "arXiv 2011.09157"
    )
    config: DenseCLConfig

    def __init__(self, config: DenseCLConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.query = Tower(inputs.encoder, config, inputs.data.side)
        self.key = copy_of(self.query)
        self.queue = Queue(config.queue, config.dim)
        self.dense_queue = Queue(config.queue, config.dim)

    @classmethod
    def views(cls, config: DenseCLConfig, image_size: Size) -> dict[str, View]:
        view = View(size=image_size, **config.view.model_dump())
        return {"image": view, "other": view}

    def dense_weight(self, step: int) -> float:
        """Lambda of the step that follows `step` done ones."""
        return 0.0 if step < self.config.warmup_steps else self.config.dense_weight

    def forward(self, batch: Batch, progress: Progress) -> Output:
        b_q, q, d_q = self.query(batch["image"])
        with torch.no_grad():
            b_k, k, d_k = self.key(batch["other"])  # its BatchNorm too goes by the batch
        q, k, d_bar = (F.normalize(x.float(), dim=1) for x in (q, k, d_k.float().mean(dim=2)))
        tau = self.config.temperature
        found = {
            "global": queue_info_nce(q, k, self.queue.rows, tau),
            "dense": queue_info_nce(*dense_pairs(d_q, d_k, match(b_q, b_k)), self.dense_queue.rows, tau),
        }
        self.queue.put(k)
        self.dense_queue.put(d_bar)
        metrics: dict[str, Tensor] = {}
        for name, (loss, right) in found.items():
            metrics |= {f"{name}_loss": loss.detach().mean(), f"{name}_top1": right.float().mean()}
        weight = self.dense_weight(progress.step)
        return Output((1 - weight) * found["global"][0].mean() + weight * found["dense"][0].mean(), metrics)

    def after_step(self, progress: Progress) -> None:
        follow(self.key, self.query, self.config.momentum)
        self.queue.turn()
        self.dense_queue.turn()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """`matched`: the image laid out of those parts of its mirror image that its own are matched with, turned back.

        Where all matches are right it is the image; where a network goes by position, the parts are in mirrored order.
        """
        image = batch["image"]
        other = image.flip(-1)
        c = match(self.query(image)[0], self.query(other)[0])
        S, H = math.isqrt(c.shape[1]), image.shape[-1]
        p = math.ceil(H / S)
        parts = patchify(F.interpolate(image, size=S * p), p)  # as it is, where the places divide it
        turned = c - c % S + S - 1 - c % S  # where that part of the mirror image is in the image
        matched = unpatchify(parts.gather(1, turned[:, :, None].expand_as(parts)), p)
        return {"image": image, "other": other, "matched": F.interpolate(matched, size=H)}

    def export(self) -> nn.Module:
        return self.query.encoder
