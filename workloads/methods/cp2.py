"""CP2: copy-paste contrastive pretraining for semantic segmentation (Wang et al., ECCV 2022, arXiv 2203.11709).

A whole segmentation network learns, backbone and head: the model of the job is `deeplab`, and it is what is exported. A
rectangle of one view of an image is pasted on another image, and one of its other view on a third. As in MoCo v2 (Chen
et al. 2020, arXiv 2003.04297), the mean feature of one foreground should be most like that of the other; and each place
of one foreground should be more like those of the other than the background is. For Quick Tuning, a pretrained
backbone is named by `init:`; the head starts anew.

Differences from the released code. The backgrounds of an image are views of the next two images of the batch, which is
shuffled, rather than of two more passes over the data in other orders. The rectangle is kept as it is drawn; the code
looks for pixels of value 0. Where it shuffles keys over workers, BatchNorm goes by the batch of all of them
(`engine.sync_batchnorm`, the default), for queries and keys. The slow copy moves after a step rather than at the
beginning of the next one, which is the same. The learning rate falls by step, not by epoch. Biases and norms do not
decay. The middle of a place is found for maps of any stride. Parameters that the maps do not need are not trained.

Any encoder with maps of several places will do.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.transforms import erasing
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.maps import last_maps, unread
from workloads.parts.crop import MoCoCrop
from workloads.parts.ema import copy_of, follow
from workloads.parts.neighbours import following
from workloads.parts.precision import full_precision
from workloads.parts.queue import Queue
from workloads.parts.queue_infonce import queue_info_nce

FOREGROUND = erasing.Erasing(p=1, area=(0.5, 0.8), ratio=(0.8, 1.25))  # code; never between the middles of places


class CP2Config(MethodConfig):
    dim: int = Field(default=128, ge=1)  # code
    queue: int = Field(default=65536, ge=1)  # code
    temperature: float = Field(default=0.2, gt=0)  # code; of whole foregrounds, places are compared with 1
    momentum: float = Field(default=0.999, ge=0, le=1)  # code
    dense_weight: float = Field(default=0.2, ge=0)  # alpha; code
    view: MoCoCrop = MoCoCrop()  # of foregrounds and backgrounds


def foreground(keys: Tensor, size: int, salt: str) -> Tensor:
    """M: bool [B, size, size], True in a rectangle for each key."""
    top, left, h, w = erasing.draw(FOREGROUND, keys, (size, size), salt)[:, :, None].unbind(1)  # [B, 1]
    at = torch.arange(size, device=keys.device)
    rows, columns = (at >= top) & (at < top + h), (at >= left) & (at < left + w)
    return rows[:, :, None] & columns[:, None, :]


def paste(f: Tensor, b: Tensor, M: Tensor) -> Tensor:
    """X: the foreground image where M is True, else the background, [B, 3, H, W]."""
    return torch.where(M[:, None], f, b)


def at_places(M: Tensor, side: int) -> Tensor:
    """M at the middle of each place of a map of `side` places a side: float32 [B, side * side], 0 or 1."""
    middle = (2 * torch.arange(side, device=M.device) + 1) * M.shape[1] // (2 * side)  # 8, 24, 40, ... at stride 16
    return M[:, middle[:, None], middle].flatten(1).float()


def pooled(x: Tensor, m: Tensor) -> Tensor:
    """v: the direction of the sum of features [B, D, S] of unit length over the places where m [B, S] is 1, [B, D]."""
    return F.normalize((x * m[:, None]).sum(dim=2), dim=1)


def dense_loss(S: Tensor, m_q: Tensor, m_k: Tensor) -> Tensor:
    """How much more foreground is like foreground than the rest of the query is.

    Args:
        S: likeness of each place of the query to each of the key, [B, S, S].
        m_q: foreground of the query, [B, S], 0 or 1.
        m_k: of the key.

    Returns:
        The mean over images of that over their pairs of places of both foregrounds.
    """
    log_p = S.log_softmax(dim=1)  # over the places of the query, for each of the key
    pairs = m_q[:, :, None] * m_k[:, None, :]
    return (-(log_p * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)).mean()


class Tower(nn.Module):
    """The segmentation network, and the projection in the place of its classifier."""

    def __init__(self, encoder: nn.Module, dim: int, image_size: int) -> None:
        super().__init__()
        probe = copy.deepcopy(encoder).to("meta").eval()
        with torch.enable_grad():
            maps = last_maps(probe, torch.empty(1, 3, image_size, image_size, device="meta"))
            idle = unread(probe, maps)
        C, self.side = maps.shape[1], maps.shape[2]
        if self.side == 1:
            raise ValueError(
                f"got maps of 1 x 1 for images of {image_size} pixels, expected several places, of foreground and of "
                "background; use larger images or a network of smaller stride, such as model: {name: deeplab, ...}"
            )
        for name in idle:
            encoder.get_parameter(name).requires_grad_(False)
        self.encoder = encoder
        self.projector = nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(), nn.Conv2d(C, dim, 1))

    def forward(self, X: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, dim, side * side] of unit length at each place, in float32."""
        return F.normalize(self.projector(last_maps(self.encoder, X)).float().flatten(2), dim=1)


class CP2(Method):
    Config = CP2Config
    paper: ClassVar[str] = (
        "CP2: Copy-Paste Contrastive Pretraining for Semantic Segmentation, Wang et al. 2022, arXiv 2203.11709"
    )
    config: CP2Config

    def __init__(self, config: CP2Config, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.query = Tower(inputs.encoder, config.dim, inputs.data.side)
        self.key = copy_of(self.query)
        self.queue = Queue(config.queue, config.dim)

    @classmethod
    def views(cls, config: CP2Config, image_size: Size) -> dict[str, View]:
        view = View(size=image_size, **config.view.model_dump())
        return dict.fromkeys(("image", "other", "background", "other_background"), view)

    def masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """M_q and M_k."""
        keys, size = batch["key"], batch["image"].shape[-1]
        return foreground(keys, size, "cp2.query"), foreground(keys, size, "cp2.key")

    def forward(self, batch: Batch, progress: Progress) -> Output:
        M_q, M_k = self.masks(batch)
        X_q = paste(batch["image"], following(batch["background"], 1), M_q)
        X_k = paste(batch["other"], following(batch["other_background"], 2), M_k)
        m_q, m_k = (at_places(M, self.query.side) for M in (M_q, M_k))
        q = self.query(X_q)  # [B, D, S]
        with torch.no_grad():
            k = self.key(X_k)  # its BatchNorm too goes by the batch
        v_q, v_k = pooled(q, m_q), pooled(k, m_k)
        losses, right = queue_info_nce(v_q, v_k, self.queue.rows, self.config.temperature)
        self.queue.put(v_k)
        with full_precision(q.device):
            S = q.mT @ k  # [B, S, S]
        instance = losses.mean()
        dense = dense_loss(S, m_q, m_k)
        best = S.detach().flatten(1).argmax(dim=1, keepdim=True)
        both = (m_q[:, :, None] * m_k[:, None, :]).flatten(1)
        metrics = {
            "instance_loss": instance.detach(),
            "dense_loss": dense.detach(),
            "instance_top1": right.float().mean(),
            "foreground_top1": both.gather(1, best).mean(),  # the two places that are most alike are both of it
        }
        return Output(instance + self.config.dense_weight * dense, metrics)

    def after_step(self, progress: Progress) -> None:
        follow(self.key, self.query, self.config.momentum)
        self.queue.turn()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """`query`, `key`: an image and its mirror image, pasted; `foreground`: those places of the query, others grey.

        `found`: those of its places that are more like the foreground of the key than its average place is.
        """
        image = batch["image"]
        M_q, M_k = self.masks(batch)
        X_q, X_k = paste(image, image.roll(-1, 0), M_q), paste(image.flip(-1), image.roll(-2, 0), M_k)
        m_q, m_k = (at_places(M, self.query.side) for M in (M_q, M_k))
        like = (self.query(X_q).mT @ pooled(self.query(X_k), m_k)[:, :, None])[:, :, 0]  # [B, S]
        found = (like > like.mean(dim=1, keepdim=True)).float()

        def shown(m: Tensor) -> Tensor:
            grid = m.unflatten(1, (self.query.side, -1))[:, None]
            return X_q * F.interpolate(grid, size=image.shape[-1])

        return {"query": X_q, "key": X_k, "foreground": shown(m_q), "found": shown(found)}

    def export(self) -> nn.Module:
        return self.query.encoder
