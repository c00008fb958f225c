"""MAE: masked autoencoders are scalable vision learners (He et al., CVPR 2022, arXiv 2111.06377).

Hide most patches of an image, encode only the visible ones with a ViT, and let a light
decoder predict the pixels of the hidden ones. The encoder is what stays.

Differences from the released code, none in the mathematics: the noise of the mask is
drawn per sample from (seed, epoch, row) instead of a generator per rank, so that runs
on one and on two ranks agree; the order of visible tokens is theirs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from workloads.data.keys import uniform
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.vit import plain_vit
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.mae_decoder import DecoderConfig, MAEDecoder
from workloads.parts.masking import Mask, expect_visible, random_masking, take
from workloads.parts.reconstruction import masked_mse, pictures, pixel_target


class Augmentation(RandomResizedCrop):
    """RandomResizedCrop and flip (appendix A.1); no colour jitter."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # code: bicubic, which costs small images more


class MAEConfig(DecoderConfig, MethodConfig):
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)  # section 4.1, figure 5
    norm_pix: bool = True  # table 1d: the best models predict normalised pixels
    view: Augmentation = Augmentation()


class MAE(Method):
    Config = MAEConfig
    paper: ClassVar[str] = "MAE: Masked Autoencoders Are Scalable Vision Learners, He et al. 2022, arXiv 2111.06377"
    config: MAEConfig

    def __init__(self, config: MAEConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.encoder = plain_vit(inputs.encoder, "MAE drops tokens inside the encoder")
        self.encoder.pos_embed.requires_grad_(False)
        vit = self.encoder.config
        expect_visible(vit.grid**2, config.mask_ratio)
        self.decoder = MAEDecoder(config, vit.dim, vit.grid, vit.patch_size**2 * 3)

    @classmethod
    def views(cls, config: MAEConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def mask(self, keys: Tensor) -> Mask:
        noise = uniform(keys, self.encoder.config.grid**2, salt="mae.mask")  # [B, L]
        return random_masking(noise, self.config.mask_ratio)

    def encode(self, images: Tensor, mask: Mask) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + K, D]: positions are added before tokens are dropped."""
        return self.encoder.encode(take(self.encoder.embed(images), mask.ids_keep))

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the removed patches only."""
        target = pixel_target(images, self.encoder.config.patch_size, norm_pix=self.config.norm_pix)
        return masked_mse(pred, target, mask)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, mask = batch["image"], self.mask(batch["key"])
        pred = self.decoder(self.encode(images, mask), mask)  # [B, L, p * p * 3]
        return Output(self.loss(images, pred, mask.mask))

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        images, mask = batch["image"], self.mask(batch["key"])
        pred = self.decoder(self.encode(images, mask), mask)
        return pictures(images, pred, mask.mask, self.encoder.config.patch_size, norm_pix=self.config.norm_pix)

    def export(self) -> nn.Module:
        return self.encoder
