"""DMAE: masked autoencoders enable efficient knowledge distillers (Bai et al., CVPR 2023, arXiv 2208.12256).

A small MAE learns from a large one that is already pretrained. Both encode the same few
visible patches; beside its own masked pixels the student predicts, by one linear layer,
what an intermediate block of the teacher says of each visible token. The teacher stops at
that block: it costs a part of its depth on a quarter of the tokens, and no decoder.

Where paper and released code differ: the paper writes the L1 distance of projected and
teacher features; the code, which the published numbers come from, brings both to unit
length first where there is a projection. So does this file; without a projection the raw
features are compared, as in the code.

Differences from the released code, none in the mathematics: the teacher runs no block
that is not asked for (theirs runs all, and the decoder); the noise of the mask is drawn per
sample from (seed, epoch, row) instead of a generator per rank.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from workloads.data.keys import uniform
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.vit import ViT, plain_vit
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.frozen import Teacher
from workloads.parts.mae_decoder import DecoderConfig, MAEDecoder
from workloads.parts.masking import Mask, expect_visible, random_masking, take
from workloads.parts.reconstruction import masked_mse, pictures, pixel_target

Blocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class Augmentation(RandomResizedCrop):
    """RandomResizedCrop, bicubic, and flip: those of MAE; no colour jitter."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class DMAEConfig(DecoderConfig, MethodConfig):
    """`student_blocks` and `teacher_blocks` are aligned in pairs, in their order; 0 is the first block."""

    teacher: str  # an encoder that MAE exported, of the student's image and patch size
    student_blocks: Blocks = (8,)  # the 9th of 12: about 3/4 of the depth
    teacher_blocks: Blocks = (17,)  # the 18th of 24
    head: Literal["linear", "none"] = "linear"  # code: one layer for each pair, student width -> teacher width
    align_loss: Literal["l1", "l2"] = "l1"
    align_weight: float = Field(default=1.0, gt=0)  # code
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)  # 0.95 and 0.98 in the ablation
    norm_pix: bool = False  # code: the released teacher too predicts raw pixels
    view: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _pairs(self) -> DMAEConfig:
        if len(self.student_blocks) != len(self.teacher_blocks):
            raise ValueError(
                f"got student_blocks={list(self.student_blocks)} for teacher_blocks={list(self.teacher_blocks)}, "
                "expected as many of one as of the other; name the pairs in their order"
            )
        return self


class DMAE(Method):
    Config = DMAEConfig
    paper: ClassVar[str] = (
        "DMAE: Masked Autoencoders Enable Efficient Knowledge Distillers, Bai et al. 2023, arXiv 2208.12256"
    )
    config: DMAEConfig

    def __init__(self, config: DMAEConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.encoder = plain_vit(inputs.encoder, "DMAE drops tokens inside the student")
        self.encoder.pos_embed.requires_grad_(False)
        vit = self.encoder.config
        expect_visible(vit.grid**2, config.mask_ratio)
        self.teacher = Teacher(inputs.load(config.teacher), self.views(config, vit.image_size)["image"])
        self._expect_alike(plain_vit(self.teacher.module, "DMAE drops tokens inside the teacher"))
        self.decoder = MAEDecoder(config, vit.dim, vit.grid, vit.patch_size**2 * 3)
        linear = config.head == "linear"
        self.heads = nn.ModuleList(  # with torch's own init, not MAE's: as in the code
            nn.Linear(vit.dim, self.teacher.width) if linear else nn.Identity() for _ in config.student_blocks
        )

    def _expect_alike(self, teacher: ViT) -> None:
        """Raises ValueError where tokens or blocks of student and teacher do not match."""
        ours, theirs = self.encoder.config, teacher.config
        if (ours.image_size, ours.patch_size) != (theirs.image_size, theirs.patch_size):
            raise ValueError(
                f"got a teacher of image_size={theirs.image_size}, patch_size={theirs.patch_size} for a student of "
                f"image_size={ours.image_size}, patch_size={ours.patch_size}, expected the same patches; change model"
            )
        if self.config.head == "none" and ours.dim != theirs.dim:
            raise ValueError(
                f"got head: none for a student of dim={ours.dim} and a teacher of dim={theirs.dim}, expected equal "
                "ones; use head: linear"
            )
        for name, depth in (("student_blocks", ours.depth), ("teacher_blocks", theirs.depth)):
            blocks: tuple[int, ...] = getattr(self.config, name)
            if max(blocks) >= depth:
                raise ValueError(
                    f"got {name}={list(blocks)} for {depth} blocks, expected 0 to {depth - 1}; the paper takes the one "
                    f"at 3/4 of the depth, {max(0, depth * 3 // 4 - 1)}"
                )

    @classmethod
    def views(cls, config: DMAEConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def mask(self, keys: Tensor) -> Mask:
        noise = uniform(keys, self.encoder.config.grid**2, salt="dmae.mask")  # [B, L]
        return random_masking(noise, self.config.mask_ratio)

    def encode(self, images: Tensor, mask: Mask) -> list[Tensor]:
        """[B, 3, H, W] -> CLS and visible tokens after each block of the student, [B, 1 + K, D] before its norm."""
        return list(self.encoder.layers(take(self.encoder.embed(images), mask.ids_keep)))

    @torch.no_grad()
    def targets(self, images: Tensor, mask: Mask) -> list[Tensor]:
        """The same tokens after `teacher_blocks`, float32 [B, 1 + K, D_T] each; deeper blocks are not run."""
        images, blocks = self.teacher.see(images), self.config.teacher_blocks
        vit = cast(ViT, self.teacher.module)
        layers = vit.layers(take(vit.embed(images), mask.ids_keep))
        after = {l_T: x.float() for l_T, x in enumerate(islice(layers, max(blocks) + 1)) if l_T in blocks}
        return [after[l_T] for l_T in blocks]

    def distance(self, z_S: Tensor, z_T: Tensor) -> Tensor:
        """Mean over images, tokens and channels, of [B, 1 + K, D_T] behind the head and of the teacher.

        At unit length where there is a projection: then L1 is at most 2 / sqrt(D_T), small beside the pixels' loss.
        """
        z_S, z_T = z_S.float(), z_T.float()
        if self.config.head == "linear":
            z_S, z_T = F.normalize(z_S, dim=-1), F.normalize(z_T, dim=-1)
        return F.l1_loss(z_S, z_T) if self.config.align_loss == "l1" else F.mse_loss(z_S, z_T)

    def align(self, states: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The sum over pairs of the distance between a block of the student, projected, and one of the teacher."""
        pairs = zip(self.heads, self.config.student_blocks, targets, strict=True)
        return torch.stack([self.distance(head(states[l_S]), z_T) for head, l_S, z_T in pairs]).sum()

    def decode(self, states: list[Tensor], mask: Mask) -> Tensor:
        """What `encode` returned -> pixels of each patch, [B, L, p * p * 3]."""
        pred: Tensor = self.decoder(self.encoder.norm(states[-1]), mask)
        return pred

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, mask = batch["image"], self.mask(batch["key"])
        states = self.encode(images, mask)
        target = pixel_target(images, self.encoder.config.patch_size, norm_pix=self.config.norm_pix)
        reconstruction = masked_mse(self.decode(states, mask), target, mask.mask)
        alignment = self.align(states, self.targets(images, mask))
        metrics = {"reconstruction": reconstruction.detach(), "alignment": alignment.detach()}
        return Output(reconstruction + self.config.align_weight * alignment, metrics)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        images, mask = batch["image"], self.mask(batch["key"])
        pred = self.decode(self.encode(images, mask), mask)
        return pictures(images, pred, mask.mask, self.encoder.config.patch_size, norm_pix=self.config.norm_pix)

    def export(self) -> nn.Module:
        return self.encoder
