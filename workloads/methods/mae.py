"""MAE: masked autoencoders are scalable vision learners (He et al., CVPR 2022, arXiv 2111.06377).

Hide most patches of an image, encode only the visible ones with a ViT, and let a light
decoder predict the pixels of the hidden ones. The encoder is what stays.

Differences from the released code, none in the mathematics: the noise of the mask is
drawn per sample from (seed, epoch, row) instead of a generator per rank, so that runs
on one and on two ranks agree; the order of visible tokens is theirs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from workloads.data.keys import uniform
from workloads.data.views import View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.vit import Block, ViT, init_transformer, sincos_2d
from workloads.parts.masking import Mask, random_masking, take
from workloads.parts.patches import normalise_patches, patchify, unpatchify


class Augmentation(MethodConfig):
    """RandomResizedCrop and flip (appendix A.1); no colour jitter."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotate_deg: float = 0.0


class MAEConfig(MethodConfig):
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)  # section 4.1, figure 5
    decoder_dim: int = Field(default=512, ge=4)  # table 1b
    decoder_depth: int = Field(default=8, ge=1)  # table 1a
    decoder_heads: int = Field(default=16, ge=1)
    norm_pix: bool = True  # table 1d: the best models predict normalised pixels
    view: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _divisible(self) -> MAEConfig:
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"got decoder_dim={self.decoder_dim} with decoder_heads={self.decoder_heads}, expected decoder_dim "
                "to be a multiple of 4 and of decoder_heads; change one of them"
            )
        return self


class MAE(Method):
    Config = MAEConfig
    paper: ClassVar[str] = "MAE: Masked Autoencoders Are Scalable Vision Learners, He et al. 2022, arXiv 2111.06377"
    config: MAEConfig
    encoder: ViT

    def __init__(self, config: MAEConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        if not isinstance(inputs.encoder, ViT):
            raise ValueError(
                f"got model {type(inputs.encoder).__name__}, expected a ViT: MAE drops tokens inside the encoder; "
                "use model: {name: vit, ...} or a plain ViT of timm such as vit_base_patch16_224"
            )
        self.encoder = inputs.encoder
        self.encoder.pos_embed.requires_grad_(False)
        vit = self.encoder.config
        if int(vit.grid**2 * (1 - config.mask_ratio)) < 1:
            raise ValueError(
                f"got mask_ratio={config.mask_ratio} for {vit.grid**2} patches, expected one visible patch at least; "
                f"use at most {1 - 1 / vit.grid**2:.3f}, or smaller patches"
            )
        dim = config.decoder_dim
        self.decoder_embed = nn.Linear(vit.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("decoder_pos_embed", sincos_2d(dim, vit.grid)[None])  # [1, 1 + L, Dd]
        self.decoder_blocks = nn.ModuleList(Block(dim, config.decoder_heads) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, vit.patch_size**2 * 3)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            init_transformer(part)
        nn.init.normal_(self.mask_token, std=0.02)

    @classmethod
    def views(cls, config: MAEConfig, image_size: int) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def mask(self, keys: Tensor) -> Mask:
        noise = uniform(keys, self.encoder.config.grid**2, salt="mae.mask")  # [B, L]
        return random_masking(noise, self.config.mask_ratio)

    def encode(self, images: Tensor, mask: Mask) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + K, D]: positions are added before tokens are dropped."""
        return self.encoder.encode(take(self.encoder.embed(images), mask.ids_keep))

    def decode(self, latent: Tensor, mask: Mask) -> Tensor:
        """[B, 1 + K, D] -> predicted patches [B, L, p * p * 3]."""
        x = self.decoder_embed(latent)
        hidden = mask.ids_restore.shape[1] - mask.ids_keep.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], hidden, -1)
        patches = take(torch.cat([x[:, 1:], mask_tokens], dim=1), mask.ids_restore)  # [B, L, Dd], image order
        x = torch.cat([x[:, :1], patches], dim=1) + self.get_buffer("decoder_pos_embed")
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the removed patches only."""
        target = patchify(images, self.encoder.config.patch_size)
        if self.config.norm_pix:
            target = normalise_patches(target)
        error = (pred.float() - target).square().mean(dim=-1)  # [B, L]
        return (error * mask).sum() / mask.sum()

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images: Tensor = batch["image"]
        mask = self.mask(batch["key"])
        pred = self.decode(self.encode(images, mask), mask)
        return Output(self.loss(images, pred, mask.mask))

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """`original`, `masked` (hidden patches grey), `reconstruction` (predicted where hidden, given where kept)."""
        images: Tensor = batch["image"]
        p = self.encoder.config.patch_size
        mask = self.mask(batch["key"])
        patches = patchify(images, p)
        pred = self.decode(self.encode(images, mask), mask).float()
        if self.config.norm_pix:  # shown in the scale of the patch that was hidden
            mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
            pred = pred * (var + 1e-6).sqrt() + mean
        hidden = mask.mask[:, :, None]
        return {
            "original": images,
            "masked": unpatchify(patches * (1 - hidden), p),
            "reconstruction": unpatchify(patches * (1 - hidden) + pred * hidden, p),
        }

    def export(self) -> nn.Module:
        return self.encoder
