"""TransReID-SSL: Self-Supervised Pre-Training for Transformer-Based Person Re-Identification (Luo et al. 2021, arXiv
2111.12084).

DINO on crops of people, who stand: 256 x 128 pixels, local crops of 128 x 64. Two things come to it. The patches are
embedded by a stem of convolutions with IBN, which knows less of cameras and light (`model: {name: vit_small_ics}`, see
`models/vit_ics.py`). And of the unlabelled images only those are learned from that are like the images of the target:
the evaluation `forgetting` scores them, `data: {train: {shards: ..., scores: ..., keep: 0.5}}` keeps the best.

With the stem there is BatchNorm: it goes by the batch in the teacher too, over all workers; the teacher follows the
student in its parameters, what its BatchNorm remembers is of its own batches. Crops keep the usual shapes of 3/4 to 4/3
and are then resized to 1 : 2, which stretches people, as in the code.

Paper and released code: defaults are the code's. Set with the job, as its scripts do: each parameter's gradient is
shortened to 3 by itself (`optimizer: {clip_parameter_norm: 3.0}`), weight decay grows from .04 to .4, the student drops
paths with .1 (`model: {drop_path_rate: 0.1}`), the teacher none.

Differences from the released code: the blocks of the ViT are initialised as those of MAE, with positions that start as
sines and are trained. Positions of local crops are resized by bicubic interpolation onto the exact grid (theirs is off
by a tenth of a patch). While the last layer is frozen its gradient is zero rather than absent, since DDP waits for
each, so AdamW decays its rows, whose length says nothing, and counts the steps.

Measured: the stem's features are nearly alike at first (cosine .88 between CLS of untrained toy networks, .49 without
it), so DINO starts near the collapse in which all say the same. Toy people part from it within 60 steps, images of
CIFAR-10 do not in 468 (`recipes/cifar10_transreid_ssl.yaml`): watch `teacher_entropy` and `kl`.

Not built: the stages after pretraining. `fine_tune` trains a classifier of identities; the baseline of ReID (BNNeck,
triplet loss, batches of P x K) and the clustering that learns a target without labels (Cluster-Contrast) are not here.
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
from workloads.parts.self_distillation import Centre, distil, teacher_of


class TransReIDSSLConfig(MethodConfig):
    out_dim: int = Field(default=65536, ge=2)  # K, code
    hidden_dim: int = Field(default=2048, ge=1)  # code, as in DINO
    bottleneck_dim: int = Field(default=256, ge=1)  # code, as in DINO
    student_temperature: float = Field(default=0.1, gt=0)  # code
    teacher_temperature: float = Field(default=0.04, gt=0)  # code: constant
    centre_momentum: float = Field(default=0.9, ge=0, le=1)  # code
    momentum: float = Field(default=0.996, ge=0, le=1)  # of the first step, code; 1 after the last
    freeze_last_layer: int = Field(default=1, ge=0)  # epochs, code
    local_crops: int = Field(default=8, ge=0)  # code
    local_size: Size = (128, 64)  # scripts
    global_view: MultiCropView = GLOBAL_VIEW  # code: those of DINO
    other_view: MultiCropView = OTHER_VIEW
    local_view: MultiCropView = LOCAL_VIEW


class TransReIDSSL(Method):
    Config = TransReIDSSLConfig
    paper: ClassVar[str] = (
        "TransReID-SSL: Self-Supervised Pre-Training for Transformer-Based Person Re-Identification, Luo et al. 2021, "
        "arXiv 2111.12084"
    )
    config: TransReIDSSLConfig

    def __init__(self, config: TransReIDSSLConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        encoder: Any = inputs.encoder
        if config.local_crops:
            expect_local_crops(encoder, config.local_size)
        if isinstance(encoder, ViT):
            encoder.pool = "token"
        self.encoder = encoder
        self.head = DINOHead(
            encoder.num_features, config.out_dim, hidden=config.hidden_dim, bottleneck=config.bottleneck_dim
        )
        self.teacher = teacher_of(self.encoder)
        self.teacher_head = teacher_of(self.head)
        self.centre = Centre(config.out_dim, config.centre_momentum)

    @classmethod
    def views(cls, config: TransReIDSSLConfig, image_size: Size) -> dict[str, View]:
        large = config.global_view, config.other_view
        return crop_views(image_size, large, config.local_size, config.local_view, config.local_crops)

    def student_logits(self, crops: list[Tensor], *, frozen: bool) -> Tensor:
        """V crops [B, 3, H, W] -> g_s [V * B, K]; crops of one size are one batch of BatchNorm."""
        return self.head(torch.cat(multi_crop(self.encoder, crops)), frozen=frozen)

    @torch.no_grad()
    def teacher_logits(self, crops: list[Tensor]) -> Tensor:
        """2 crops -> g_t [2 * B, K]."""
        return self.teacher_head(torch.cat(multi_crop(self.teacher, crops)))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        config = self.config
        x = crops_of(batch, config.local_crops)
        g_t = self.teacher_logits(x[:2])
        g_s = self.student_logits(x, frozen=progress.epoch < config.freeze_last_layer)
        tau_t, tau_s = config.teacher_temperature, config.student_temperature
        return Output(*distil(g_t, g_s, self.centre, teacher_temperature=tau_t, student_temperature=tau_s))

    def after_step(self, progress: Progress) -> None:
        m = ema_momentum(progress.step, progress.total_steps, self.config.momentum)
        follow(self.teacher, self.encoder, m)
        follow(self.teacher_head, self.head, m)
        self.centre.turn()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Of a ViT, where CLS of the teacher looks."""
        return attended(self.teacher, batch["image"])

    def export(self) -> nn.Module:
        """The teacher without its head; CLS is what tells people apart."""
        return self.teacher
