"""MoCo v3: an empirical study of training self-supervised vision transformers (Chen, Xie and He, ICCV 2021).

arXiv 2104.02057. Two augmented views of an image should have like features, unlike those of
all other images of the batch. Queries come from the network that trains, with a predictor
behind it; keys from its slow copy, without. The embedding of the patches stays as it was
drawn: trained, it is where a ViT becomes unstable (section 4.2).

The feature of an image is the CLS token behind the last norm, in training and in what is
exported. The batch of all ranks is what a query is compared with, so micro-batches make the
task easier: leave `micro_batch_size` unset.

Differences from the released code: biases and norms do not decay; the ViT is initialised as
that of MAE; the bias of its last norm is not trained, since BatchNorm behind the projector's
first layer takes it out again.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from workloads.data.transforms.photometry import Photometry
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.vit import plain_vit
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.ema import copy_of, follow
from workloads.parts.heads import freeze_absorbed_bias, normed_mlp
from workloads.parts.infonce import global_info_nce
from workloads.parts.schedules import ema_momentum

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8, "gray_p": 0.2}


class Augmentation(RandomResizedCrop):
    photometry: Photometry = Photometry()


class MoCoV3Config(MethodConfig):
    """Views are those of BYOL (Grill et al. 2020, appendix B): alike but for blur and solarization."""

    dim: int = Field(default=256, ge=1)  # of queries and keys, section 3
    mlp_dim: int = Field(default=4096, ge=1)  # of the hidden layers of projector and predictor
    temperature: float = Field(default=0.2, gt=0)  # code, for ViT
    momentum: float = Field(default=0.99, ge=0, le=1)  # of the first step, code; 1 after the last
    view: Augmentation = Augmentation(photometry=Photometry(**JITTER, blur_p=1.0))
    other_view: Augmentation = Augmentation(photometry=Photometry(**JITTER, blur_p=0.1, solarize_p=0.2))


def projection_head(inputs: int, layers: int, hidden: int, dim: int) -> nn.Sequential:
    """`normed_mlp` whose last BatchNorm has no parameters."""
    made = normed_mlp(inputs, *[hidden] * (layers - 1), dim)
    made[-1] = nn.BatchNorm1d(dim, affine=False)
    return made


class MoCoV3(Method):
    Config = MoCoV3Config
    paper: ClassVar[str] = (
        "MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers, Chen et al. 2021, "
        "arXiv 2104.02057"
    )
    config: MoCoV3Config

    def __init__(self, config: MoCoV3Config, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.encoder = plain_vit(inputs.encoder, "MoCo v3 freezes its patch embedding and reads its CLS token")
        self.encoder.pool = "token"
        self.encoder.pos_embed.requires_grad_(False)
        self.encoder.patch_embed.requires_grad_(False)
        freeze_absorbed_bias(self.encoder)
        self.projector = projection_head(self.encoder.config.dim, 3, config.mlp_dim, config.dim)
        self.predictor = projection_head(config.dim, 2, config.mlp_dim, config.dim)
        self.momentum_encoder = copy_of(self.encoder)
        self.momentum_projector = copy_of(self.projector)

    @classmethod
    def views(cls, config: MoCoV3Config, image_size: Size) -> dict[str, View]:
        return {
            "image": View(size=image_size, **config.view.model_dump()),
            "other": View(size=image_size, **config.other_view.model_dump()),
        }

    def query(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> q [B, dim]."""
        return self.predictor(self.projector(self.encoder(images)))

    @torch.no_grad()
    def key(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> k [B, dim]; its BatchNorm too goes by the batch."""
        return self.momentum_projector(self.momentum_encoder(images))

    def loss(self, q: Tensor, k: Tensor) -> Tensor:
        """2 tau times the cross-entropy of each query [B, dim] against the keys of all ranks (algorithm 1)."""
        return 2 * self.config.temperature * global_info_nce(q, k, self.config.temperature)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        x1, x2 = batch["image"], batch["other"]
        return Output(self.loss(self.query(x1), self.key(x2)) + self.loss(self.query(x2), self.key(x1)))

    def after_step(self, progress: Progress) -> None:
        m = ema_momentum(progress.step, progress.total_steps, self.config.momentum)
        follow(self.momentum_encoder, self.encoder, m)
        follow(self.momentum_projector, self.projector, m)

    def export(self) -> nn.Module:
        return self.encoder
