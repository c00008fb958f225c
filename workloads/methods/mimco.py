"""MimCo: masked image modeling pre-training with contrastive teacher (Zhou et al., ACM MM 2022, arXiv 2209.03063).

A frozen network that was trained by contrast sees the whole image. The student sees the
same crop with most patches replaced by a learned token, and says of each hidden patch what
the teacher says there: it is to be most like that among all patches of the image. The same
is asked of whole images among all images of the batch. So the student learns by masking
what is as separable as the teacher.

No code was released and the abstract gives no settings: what is marked (?) is our choice, to
be set in a job. So is this: student and teacher are ViTs; the feature of an image is what the
teacher pools (CLS of MoCo v3), and the student pools alike; heads normalise by LayerNorm, so
that a sample meets others in the image loss only; patches of other images are no candidates,
since their skies and lawns would be false negatives.

Images are compared with those of a micro-batch on all ranks: leave `micro_batch_size` unset.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.keys import uniform
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.vit import ViT, plain_vit
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.frozen import Teacher
from workloads.parts.infonce import global_info_nce, info_nce
from workloads.parts.masking import expect_visible, random_masking, take
from workloads.parts.patches import patchify, unpatchify
from workloads.parts.reconstruction import hide, masked_mean
from workloads.parts.tokens import grid_of, hidden_patches, patch_size_of


class Augmentation(RandomResizedCrop):
    """RandomResizedCrop and flip, no colour jitter (?): one view, which student and teacher share."""

    crop_scale: tuple[float, float] = (0.2, 1.0)


class MimCoConfig(MethodConfig):
    teacher: str  # an encoder that was trained by contrast
    mask_ratio: float = Field(default=0.6, gt=0, lt=1)  # (?)
    temperature: float = Field(default=0.2, gt=0)  # (?)
    alpha: float = Field(default=1.0, ge=0)  # (?) weight of the loss of images
    head_dim: int = Field(default=2048, ge=1)  # (?) of the hidden layer of both heads
    view: Augmentation = Augmentation()


def head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, H, W] -> of patches [B, L, D] and of the image [B, D], behind the last norm; ours or timm's."""
    model: Any = network
    tokens = model.forward_features(images)
    return tokens[:, model.num_prefix_tokens :], model.forward_head(tokens, pre_logits=True)


class MimCo(Method):
    Config = MimCoConfig
    paper: ClassVar[str] = (
        "MimCo: Masked Image Modeling Pre-training with Contrastive Teacher, Zhou et al. 2022, arXiv 2209.03063"
    )
    config: MimCoConfig

    def __init__(self, config: MimCoConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.encoder = plain_vit(inputs.encoder, "MimCo compares its patch tokens with those of the teacher")
        self.encoder.pos_embed.requires_grad_(False)
        vit = self.encoder.config
        expect_visible(vit.grid**2, config.mask_ratio)
        self.teacher = Teacher(inputs.load(config.teacher), self.views(config, vit.image_size)["image"])
        _expect_patches(self.teacher.module, vit.grid)
        self.encoder.pool = _pool_of(self.teacher.module)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.patch_head = head(vit.dim, config.head_dim, self.teacher.width)
        self.image_head = head(vit.dim, config.head_dim, self.teacher.width)

    @classmethod
    def views(cls, config: MimCoConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def mask(self, keys: Tensor) -> Tensor:
        """[B, L], 1 where a patch is hidden."""
        noise = uniform(keys, self.encoder.config.grid**2, salt="mimco.mask")
        return random_masking(noise, self.config.mask_ratio).mask

    def student(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns p [B, L, D_T] and g [B, D_T]: what the student takes the teacher's features for."""
        with hidden_patches(self.encoder, mask, self.mask_token):
            s, s_bar = features(self.encoder, images)
        return self.patch_head(s), self.image_head(s_bar)

    @torch.no_grad()
    def targets(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns t [B, L, D_T] and t_bar [B, D_T] of the whole image, where the teacher too has L patches."""
        size = self.encoder.config.grid * patch_size_of(self.teacher.module)
        return features(self.teacher.module, self.teacher.see(images, size))

    def patch_loss(self, p: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """Each hidden patch against all patches of the teacher in its image; p, t [B, L, D_T], mask [B, L]."""
        return masked_mean(info_nce(p, t, self.config.temperature)[:, :, None], mask)

    def image_loss(self, g: Tensor, t_bar: Tensor) -> Tensor:
        """Each image against the images of all ranks; g, t_bar [B, D_T]."""
        return global_info_nce(g, t_bar, self.config.temperature)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, mask = batch["image"], self.mask(batch["key"])
        (t, t_bar), (p, g) = self.targets(images), self.student(images, mask)
        patch_loss, image_loss = self.patch_loss(p, t, mask), self.image_loss(g, t_bar)
        metrics = {"patch_loss": patch_loss.detach(), "image_loss": image_loss.detach()}
        return Output(patch_loss + self.config.alpha * image_loss, metrics)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """`original`, `masked`, `matched`: in each hidden place the patch of the image that the student takes it for.

        A student without fault gives the original back.
        """
        images, patch_size = batch["image"], self.encoder.config.patch_size
        mask = self.mask(batch["key"])
        p, t = (F.normalize(tokens, dim=-1) for tokens in (self.student(images, mask)[0], self.targets(images)[0]))
        patches, hidden = patchify(images, patch_size), mask[:, :, None]
        matched = take(patches, (p @ t.mT).argmax(dim=-1))
        return {
            "original": images,
            "masked": hide(images, mask, patch_size),
            "matched": unpatchify(patches * (1 - hidden) + matched * hidden, patch_size),
        }

    def export(self) -> nn.Module:
        return self.encoder


def _expect_patches(teacher: nn.Module, grid: int) -> None:
    """Raises ValueError where the teacher would not say one feature for each patch of the student."""
    theirs = grid_of(teacher)
    if not hasattr(teacher, "num_prefix_tokens"):
        raise ValueError(f"got teacher {type(teacher).__name__}, expected a ViT, which keeps all patches; use one")
    if theirs != grid and not getattr(teacher, "dynamic_img_size", False):
        raise ValueError(
            f"got a teacher of {theirs} x {theirs} patches for a student of {grid} x {grid}, expected as many; "
            "change image_size or patch_size of model"
        )


def _pool_of(teacher: nn.Module) -> Any:
    pool = teacher.pool if isinstance(teacher, ViT) else getattr(teacher, "global_pool", "avg")
    return "token" if pool == "token" else "avg"
