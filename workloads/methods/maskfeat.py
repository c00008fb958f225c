"""MaskFeat: masked feature prediction for visual pre-training (Wei et al., CVPR 2022, arXiv 2112.09133).

Hide blocks of an image behind a learned token and let a ViT say, for each hidden patch,
in which directions its brightness changes: the histograms of oriented gradients (HOG),
which forget brightness and contrast and keep shape. There is no teacher and no decoder: all
that is thrown away is a norm and a linear layer behind the last block.

Differences from the paper and the released code:

- The ViT is ours: its position table starts at sines and cosines and is trained from there (theirs starts at small
  random values), its linear layers start at xavier-uniform.
- The warm-up starts at rate 0, theirs at 1e-6.
- Masks are drawn per sample from (seed, epoch, row) rather than by the loader, so that runs on one and on two ranks
  agree. As there, the loss is the mean over the hidden tokens of a micro-batch, whose number varies a little; over
  micro-batches and ranks, means are averaged.
- The last norm of the exported encoder is untrained, with scale 1 and shift 0: prediction has a norm of its own, which
  goes with the head. Fine-tuning replaces it in any case.

Every token goes through the encoder: a step costs what supervised training does, not the quarter of MAE.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.vit import plain_vit
from workloads.parts.block_masking import block_masking
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.hog import BINS, hog_pictures, hog_tokens
from workloads.parts.patches import patchify, unpatchify
from workloads.parts.reconstruction import hide, masked_mse
from workloads.parts.tokens import hidden_patches, patch_tokens


class Augmentation(RandomResizedCrop):
    """RandomResizedCrop and flip; no colour jitter, which hurts since the target is of the augmented image."""

    crop_scale: tuple[float, float] = (0.5, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class MaskFeatConfig(MethodConfig):
    mask_ratio: float = Field(default=0.4, gt=0, lt=1)  # 78 of 196 patches
    target: Literal["hog", "pixels"] = "hog"  # pixels: the ablation, colours as normalised for the input
    cell: int = Field(default=8, ge=1)  # pixels of a side of what a histogram is of; it divides the patch size
    view: Augmentation = Augmentation()


class MaskFeat(Method):
    Config = MaskFeatConfig
    paper: ClassVar[str] = "MaskFeat: Masked Feature Prediction, Wei et al. 2022, arXiv 2112.09133"
    config: MaskFeatConfig

    def __init__(self, config: MaskFeatConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.encoder = plain_vit(inputs.encoder, "MaskFeat puts a learned token in the place of patches")
        self.encoder.norm.requires_grad_(False)
        vit = self.encoder.config
        if config.target == "hog" and vit.patch_size % config.cell:
            raise ValueError(
                f"got cell={config.cell} for patch_size={vit.patch_size}, expected a divisor: a patch is a "
                f"whole number of cells; use cell={vit.patch_size} or another divisor"
            )
        self.n = round(vit.grid**2 * config.mask_ratio)
        if vit.grid < 2 or not self.n:
            raise ValueError(
                f"got mask_ratio={config.mask_ratio} for {vit.grid**2} patches, expected to hide one at least and not "
                "all; use smaller patches or a larger ratio"
            )
        width = BINS * (vit.patch_size // config.cell) ** 2 if config.target == "hog" else vit.patch_size**2
        self.mask_token = nn.Parameter(torch.empty(1, 1, vit.dim))
        linear = nn.Linear(vit.dim, 3 * width)
        for weight in (self.mask_token, linear.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.LayerNorm(vit.dim, eps=1e-6), linear)

    @classmethod
    def views(cls, config: MaskFeatConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def mask(self, keys: Tensor) -> Tensor:
        """Which patches are hidden, bool [B, L]: rectangles, each of n // 5 patches up to what is left to hide."""
        grid = self.encoder.config.grid
        blocks = block_masking(keys, (1, grid, grid), self.n, min_area=max(1, self.n // 5), salt="maskfeat.mask")
        return blocks.flatten(1)

    def target(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, L, C]."""
        p = self.encoder.config.patch_size
        return hog_tokens(images, p, self.config.cell) if self.config.target == "hog" else patchify(images, p)

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, H, W] -> patch tokens behind the last block [B, L, D], before the last norm."""
        with hidden_patches(self.encoder, mask, self.mask_token):
            return patch_tokens(self.encoder, images, norm=False)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, mask = batch["image"], self.mask(batch["key"])
        pred = self.head(self.encode(images, mask))  # [B, L, C]; of hidden ones only, shapes would vary
        return Output(masked_mse(pred, self.target(images), mask.float()))

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """`original`, `masked` (hidden patches grey), `target`, `prediction` (the target where patches are kept)."""
        images, p = batch["image"], self.encoder.config.patch_size
        mask, target = self.mask(batch["key"]), self.target(images)
        pred = self.head(self.encode(images, mask)).float()
        return {
            "original": images,
            "masked": hide(images, mask.float(), p),
            "target": self.draw(target),
            "prediction": self.draw(torch.where(mask[:, :, None], pred, target)),
        }

    def draw(self, tokens: Tensor) -> Tensor:
        """[B, L, C] -> [B, 3, H, W]; histograms white on black, which are about 2 and -2 in normalised colours."""
        p = self.encoder.config.patch_size
        if self.config.target == "pixels":
            return unpatchify(tokens, p)
        return 4 * hog_pictures(tokens, p, self.config.cell) - 2

    def export(self) -> nn.Module:
        return self.encoder
