"""SOLIDER: Beyond Appearance, semantic controllable self-supervised learning for human-centric visual tasks.

Chen et al., CVPR 2023, arXiv 2303.17602. DINO learns what persons look like, little of what their parts mean. People
stand upright, so the clusters of a teacher's tokens, numbered from top to bottom, are labels of parts: the student
learns to name them, also of a part that was erased from the image, from what is around it. A controller in the network
is told of each image whether appearance (lambda = 0) or semantics (lambda = 1) is wanted; only where semantics is, the
labels count. Who uses the network chooses lambda, see `models.swin_semantic`.

Paper and released code: the code never gives the classifier of parts to its optimizer, so it stays as it was drawn; the
paper trains it, as here (`train_parts`). Where no view is accepted the code's loss is no number but a list; here that
part of the loss is 0. The code's mean over accepted tokens is of each GPU; here of all of them together, of a
micro-batch where the batch is divided.

Differences that change no expected loss: views that are not accepted have an erased copy too, which weighs nothing, so
shapes are fixed and every parameter gets a gradient in every step. k-means runs on the device, from ten starts for each
view as scikit-learn does; of the two clusters of lengths the best is found rather than tried for. Which part is erased
is a function of the step, hence the same on all ranks.

Differences that may: token lengths that differ by less than 1e-4 of the longest count as equal, and such views are not
accepted: a fresh LayerNorm makes all tokens equally long (in a Swin-T up to 2e-6), and the code clusters what rounding
left over in its first steps. Weights start as those of timm's Swin, truncated normals of .02; in the code all but the
controller's as torch's layers do. The pair of layers of the controller behind the last stage, which acts on nothing, is
not built. While the last layer of the head is frozen its gradient is zero rather than absent, since DDP waits for each:
AdamW decays its rows, whose length says nothing, and counts the steps. The path-dropping of the student is set with the
model (`drop_path_rate`); the teacher has none.
"""

from __future__ import annotations

import colorsys
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.keys import uniform
from workloads.data.views import Size, View, height_width
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.parts.dino_head import DINOHead
from workloads.parts.ema import follow
from workloads.parts.multi_crop import GLOBAL_VIEW, LOCAL_VIEW, OTHER_VIEW, MultiCropView, crop_views
from workloads.parts.schedules import ema_momentum
from workloads.parts.self_distillation import Centre, distil, teacher_of
from workloads.parts.semantic_parts import Parts, accepted_mean, erase, find_parts

GLOBAL = (0.8, 1.0)  # run_solider.sh
LOCAL = (0.05, 0.8)  # run_solider.sh


class UprightView(MultiCropView):
    """That of DINO, upright."""

    crop_ratio: tuple[float, float] = (0.4, 0.6)  # width / height, code, of images of 256 x 128


class SOLIDERConfig(MethodConfig):
    parts: int = Field(default=3, ge=1)  # K, run_solider.sh
    alpha: float = Field(default=1.0, ge=0)  # of the semantic loss, run_solider.sh
    train_parts: bool = True  # the classifier of parts; False: it stays as it was drawn, as in the code
    out_dim: int = Field(default=65536, ge=2)  # code, as all below
    hidden_dim: int = Field(default=2048, ge=1)  # of both heads
    bottleneck_dim: int = Field(default=256, ge=1)  # of both heads
    student_temperature: float = Field(default=0.1, gt=0)
    teacher_temperature: float = Field(default=0.04, gt=0)
    centre_momentum: float = Field(default=0.9, ge=0, le=1)
    momentum: float = Field(default=0.996, ge=0, le=1)  # of the first step; 1 after the last
    freeze_last_layer: int = Field(default=1, ge=0)  # epochs
    local_crops: int = Field(default=8, ge=0)
    local_size: Size = (128, 64)  # run_solider.sh
    global_view: UprightView = UprightView(crop_scale=GLOBAL, photometry=GLOBAL_VIEW.photometry)
    other_view: UprightView = UprightView(crop_scale=GLOBAL, photometry=OTHER_VIEW.photometry)
    local_view: UprightView = UprightView(crop_scale=LOCAL, photometry=LOCAL_VIEW.photometry)


class SOLIDER(Method):
    Config = SOLIDERConfig
    paper: ClassVar[str] = (
        "SOLIDER: Beyond Appearance, a Semantic Controllable Self-Supervised Learning Framework, "
        "Chen et al. 2023, arXiv 2303.17602"
    )
    config: SOLIDERConfig

    def __init__(self, config: SOLIDERConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        encoder: Any = inputs.encoder
        _expect_controller(encoder, config, inputs.data.shape[1:])
        self.encoder = encoder

        def head(places: int) -> DINOHead:
            width, bottleneck = encoder.num_features, config.bottleneck_dim
            return DINOHead(width, places, hidden=config.hidden_dim, bottleneck=bottleneck)

        self.head = head(config.out_dim)
        self.part_head = head(config.parts + 1).requires_grad_(config.train_parts)
        self.teacher = teacher_of(self.encoder)
        self.teacher_head = teacher_of(self.head)
        self.centre = Centre(config.out_dim, config.centre_momentum)

    @classmethod
    def views(cls, config: SOLIDERConfig, image_size: Size) -> dict[str, View]:
        large = config.global_view, config.other_view
        return crop_views(image_size, large, config.local_size, config.local_view, config.local_crops)

    @torch.no_grad()
    def teach(self, x: Tensor, key: Tensor, lam: Tensor) -> tuple[Parts, Tensor]:
        """Both global views [2 B, 3, H, W] -> their parts, seen at lambda = 1, and g_t [2 B, K] at lambda [B]."""
        weight = torch.cat([torch.ones_like(lam).repeat(2), lam.repeat(2)])
        at_1, at_lambda = self.teacher.forward_features(torch.cat([x, x]), weight).chunk(2)
        views = zip(("image", "other"), at_1.chunk(2), strict=True)
        found = [find_parts(maps, key, self.config.parts, salt=f"solider.{view}") for view, maps in views]
        labels, accepted = (torch.cat(column) for column in zip(*found, strict=True))
        return Parts(labels, accepted), self.teacher_head(self.teacher.forward_head(at_lambda, pre_logits=True))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        config, V = self.config, self.config.local_crops
        x = torch.cat([batch["image"], batch["other"]])  # [2 B, 3, H, W]
        lam = (uniform(batch["key"], 1, "solider.lambda")[:, 0] < 0.5).to(x.dtype)  # of all crops of an image
        parts, g_t = self.teach(x, batch["key"], lam)
        erased = erase(x, parts.labels == part_of_step(progress.step, config.parts))

        maps = self.encoder.forward_features(torch.cat([erased, x]), lam.repeat(4))  # [4 B, h, w, C]
        features = [self.encoder.forward_head(maps[len(x) :], pre_logits=True)]
        if V:
            local = torch.cat([batch[f"local{i}"] for i in range(V)])
            features.append(self.encoder(local, lam.repeat(V)))
        g_s = self.head(torch.cat(features), frozen=progress.epoch < config.freeze_last_layer)
        tau_t, tau_s = config.teacher_temperature, config.student_temperature
        L1, metrics = distil(g_t, g_s, self.centre, teacher_temperature=tau_t, student_temperature=tau_s)

        named = self.part_head(maps).float().permute(0, 3, 1, 2)  # [4 B, 1 + parts, h, w]
        labels, accepted = parts.labels.repeat(2, 1, 1), parts.accepted.repeat(2)
        L2 = config.alpha * accepted_mean(F.cross_entropy(named, labels, reduction="none"), lam.repeat(4), accepted)
        right = (named.argmax(dim=1) == labels).float().mean(dim=(1, 2))  # of each image, whatever its lambda
        metrics |= {
            "semantic_loss": L2.detach(),
            "part_accuracy": (right * accepted).sum() / accepted.sum().clamp(min=1),
            "accepted": accepted.float().mean(),
        }
        return Output(L1 + L2, metrics)

    def after_step(self, progress: Progress) -> None:
        m = ema_momentum(progress.step, progress.total_steps, self.config.momentum)
        follow(self.teacher, self.encoder, m)
        follow(self.teacher_head, self.head, m)
        self.centre.turn()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """At lambda = 1 the parts that the teacher's tokens make, grey where not accepted, and those that are named."""
        images, K = batch["image"], self.config.parts
        weight = torch.ones(len(images), device=images.device)
        found = find_parts(self.teacher.forward_features(images, weight), batch["key"], K, salt="solider.image")
        named = self.part_head(self.encoder.forward_features(images, weight)).argmax(dim=-1)
        drawn = coloured(found.labels, images, K).where(found.accepted[:, None, None, None], torch.zeros_like(images))
        return {"image": images, "parts": drawn, "named": coloured(named, images, K)}

    def export(self) -> nn.Module:
        """The teacher, as released."""
        return self.teacher


def part_of_step(step: int, K: int) -> int:
    """Which of 1..K all ranks erase in this step."""
    return 1 + int(K * uniform(torch.tensor([step]), 1, "solider.part"))


def coloured(labels: Tensor, images: Tensor, K: int) -> Tensor:
    """Labels [B, h, w] as colours, red to blue, over half of the images [B, 3, H, W]; background is black."""
    hues = [colorsys.hsv_to_rgb(2 / 3 * part / max(K - 1, 1), 1, 1) for part in range(K)]
    palette = images.new_tensor([(0, 0, 0), *hues])
    over = F.interpolate(palette[labels].permute(0, 3, 1, 2), size=images.shape[-2:], mode="nearest")
    return 0.5 * images + 2 * over - 1  # about the range of normalised pixels


def _expect_controller(encoder: Any, config: SOLIDERConfig, image: tuple[int, ...]) -> None:
    """Refuses a network without a controller, and sizes that it cannot look at or find parts in."""
    if not hasattr(encoder, "semantic_weight"):
        raise ValueError(
            f"got model {type(encoder).__name__}, expected one that can be told lambda; use name: swin_semantic"
        )
    p = encoder.patch_embed.patch_size[0]
    size = height_width(config.local_size)
    if config.local_crops and any(side % p for side in size):
        fits = [max(1, side // p) * p for side in size]
        raise ValueError(f"got local_size={list(size)} for patches of {p}, expected multiples; use {fits}")
    h, w = (-(-side // encoder.feature_info[-1]["reduction"]) for side in image)
    if h * w < 2 * config.parts:
        raise ValueError(
            f"got maps of {h} x {w} tokens for {config.parts} parts in more than half of them, expected "
            f"{2 * config.parts} tokens or more; use larger images, smaller patches or fewer stages"
        )
