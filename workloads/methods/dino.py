"""DINO: emerging properties in self-supervised vision transformers (Caron et al., ICCV 2021, arXiv 2104.14294).

A student that sees a small part of an image should say what its teacher says of a large part. What they say is a
distribution over K places that mean nothing beforehand. The teacher is the slow copy of the student; its logits are
centred, so that no place wins always, and sharpened, so that not all win alike: together that prevents collapse.

Paper and released code: the text of the paper adds the centre, its algorithm 1 and the code subtract it, as here.
Defaults are the paper's; the code has 8 local crops and a teacher's temperature of 0.04 throughout.

Differences from the released code: the ViT is initialised as that of MAE, with positions that start as sines and are
trained. Positions of local crops are resized by bicubic interpolation onto the exact grid (theirs is off by a tenth of
a patch). While the last layer is frozen its gradient is zero rather than absent, since DDP waits for each: AdamW decays
its rows, whose length says nothing, and counts the steps, so some ten steps after that turn them up to 6.6 times as far
as fresh moments would (betas .9, .999). Stochastic depth of the student, 0.1 in the code, is set with the model
(`drop_path_rate`); the teacher has none. A learned gain of the last layer, which the code has for its best ViT-S and
calls unsafe for larger networks, is not built.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.vit import ViT
from workloads.parts.attention_maps import attended
from workloads.parts.dino_head import DINOHead
from workloads.parts.ema import follow
from workloads.parts.heads import freeze_absorbed_bias
from workloads.parts.multi_crop import (
    GLOBAL_VIEW,
    LOCAL_VIEW,
    OTHER_VIEW,
    MultiCropView,
    crop_views,
    crops_of,
    expect_local_crops,
    multi_crop,
)
from workloads.parts.schedules import ema_momentum
from workloads.parts.self_distillation import Centre, distil, teacher_of, teacher_temperature


class DINOConfig(MethodConfig):
    out_dim: int = Field(default=65536, ge=2)  # K, appendix C
    hidden_dim: int = Field(default=2048, ge=1)  # section 3.1
    bottleneck_dim: int = Field(default=256, ge=1)  # appendix C
    head_batch_norm: bool = False  # section 3.1: a ViT needs none anywhere
    student_temperature: float = Field(default=0.1, gt=0)  # section 3.2
    teacher_temperature: float = Field(default=0.07, gt=0)  # section 3.2; 0.04 in the code
    warmup_teacher_temperature: float = Field(default=0.04, gt=0)  # of the first epoch, section 3.2
    warmup_teacher_epochs: int = Field(default=30, ge=0)  # section 3.2; 0 in the code
    centre_momentum: float = Field(default=0.9, ge=0, le=1)  # code; 1: no centre, which collapses (section 5.3)
    momentum: float = Field(default=0.996, ge=0, le=1)  # of the first step, section 3.1; 1 after the last
    freeze_last_layer: int = Field(default=1, ge=0)  # epochs, code
    local_crops: int = Field(default=10, ge=0)  # table 8; 8 in the code
    local_size: Size = 96  # section 3.1
    global_view: MultiCropView = GLOBAL_VIEW
    other_view: MultiCropView = OTHER_VIEW
    local_view: MultiCropView = LOCAL_VIEW


class DINO(Method):
    Config = DINOConfig
    paper: ClassVar[str] = (
        "DINO: Emerging Properties in Self-Supervised Vision Transformers, Caron et al. 2021, arXiv 2104.14294"
    )
    config: DINOConfig

    def __init__(self, config: DINOConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        encoder: Any = inputs.encoder
        if config.local_crops:
            expect_local_crops(encoder, config.local_size)
        if isinstance(encoder, ViT):
            encoder.pool = "token"
        if config.head_batch_norm:
            freeze_absorbed_bias(encoder)
        self.encoder = encoder
        self.head = DINOHead(
            encoder.num_features,
            config.out_dim,
            hidden=config.hidden_dim,
            bottleneck=config.bottleneck_dim,
            batch_norm=config.head_batch_norm,
        )
        self.teacher = teacher_of(self.encoder)
        self.teacher_head = teacher_of(self.head)
        self.centre = Centre(config.out_dim, config.centre_momentum)

    @classmethod
    def views(cls, config: DINOConfig, image_size: Size) -> dict[str, View]:
        large = config.global_view, config.other_view
        return crop_views(image_size, large, config.local_size, config.local_view, config.local_crops)

    def student_logits(self, crops: list[Tensor], *, frozen: bool) -> Tensor:
        """V crops [B, 3, H, W] -> g_s [V * B, K]."""
        return self.head(torch.cat(multi_crop(self.encoder, crops)), frozen=frozen)

    @torch.no_grad()
    def teacher_logits(self, crops: list[Tensor]) -> Tensor:
        """2 crops -> g_t [2 * B, K]; where there is BatchNorm it goes by the batch."""
        return self.teacher_head(torch.cat(multi_crop(self.teacher, crops)))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        config = self.config
        tau_t = teacher_temperature(
            progress.epoch, config.warmup_teacher_temperature, config.teacher_temperature, config.warmup_teacher_epochs
        )
        x = crops_of(batch, config.local_crops)
        g_t = self.teacher_logits(x[:2])
        g_s = self.student_logits(x, frozen=progress.epoch < config.freeze_last_layer)
        tau_s = config.student_temperature
        return Output(*distil(g_t, g_s, self.centre, teacher_temperature=tau_t, student_temperature=tau_s))

    def after_step(self, progress: Progress) -> None:
        m = ema_momentum(progress.step, progress.total_steps, self.config.momentum)
        follow(self.teacher, self.encoder, m)
        follow(self.teacher_head, self.head, m)
        self.centre.turn()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Of a ViT, where CLS of the teacher looks (figure 1)."""
        return attended(self.teacher, batch["image"])

    def export(self) -> nn.Module:
        """The teacher, which is better than the student all along (section 5.2)."""
        return self.teacher
