"""A Vision Transformer whose patches are embedded by four convolutions: ICS, the IBN-based convolution stem.

From TransReID-SSL (Luo et al. 2021, arXiv 2111.12084, and its code, whose names and shapes these are): InstanceNorm on
half of the channels takes out what differs between cameras and light, BatchNorm on the other half keeps what tells
images apart (IBN-a, Pan et al. 2018, arXiv 1807.09441).

Importing this module makes the architecture known to timm: after `import workloads.models.vit_ics` an exported folder
loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from workloads.data.views import Size, height_width
from workloads.models.timm_import import timm
from workloads.models.vit import PatchEmbed, ViTConfig

CHANNELS = 64  # of the stem


class ViTICSConfig(ViTConfig):
    """A free size, as `vit`: `{name: vit_ics, image_size: [32, 16], patch_size: 8, dim: 96, depth: 4, heads: 4}`."""

    architecture: ClassVar[str] = "vit_ics"

    @model_validator(mode="after")
    def _even_patches(self) -> ViTICSConfig:
        if self.patch_size % 2:
            raise ValueError(
                f"got patch_size={self.patch_size}, expected an even one: the stem halves the resolution first; "
                f"use {self.patch_size + 1}"
            )
        return self

    def patch_embedding(self) -> ICSEmbed:
        return ICSEmbed(self.patch_size, self.dim)


class ViTSmallICS(ViTICSConfig):
    image_size: Size = (256, 128)
    dim: int = 384
    heads: int = 6


class ViTBaseICS(ViTICSConfig):
    """768 / 12 / 12, patch 16."""

    image_size: Size = (256, 128)


class IBN(nn.Module):
    """InstanceNorm of the first half of the channels, BatchNorm of the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.split = channels // 2
        self.IN = nn.InstanceNorm2d(self.split, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.split)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x[:, : self.split], x[:, self.split :]
        return torch.cat([self.IN(one.contiguous()), self.BN(two.contiguous())], dim=1)


class ICSEmbed(PatchEmbed):
    """Three convolutions at half the resolution, then patches of what they see."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__(patch_size // 2, dim, channels=CHANNELS)
        self.conv = nn.Sequential(
            nn.Conv2d(3, CHANNELS, kernel_size=7, stride=2, padding=3, bias=False),
            IBN(CHANNELS),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, kernel_size=3, padding=1, bias=False),
            IBN(CHANNELS),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.conv(images))


def _embed_layer(*, img_size: Size, patch_size: int, embed_dim: int, **_: object) -> ICSEmbed:
    """The stem as timm's ViT asks for it, with what it wants to know of it."""
    embed: Any = ICSEmbed(patch_size, embed_dim)
    height, width = height_width(img_size)
    embed.grid_size = height // patch_size, width // patch_size
    embed.num_patches = embed.grid_size[0] * embed.grid_size[1]
    return embed


def vit_ics(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    from timm.models.vision_transformer import VisionTransformer

    network: nn.Module = timm.models.build_model_with_cfg(
        VisionTransformer, "vit_ics", pretrained, embed_layer=_embed_layer, **options
    )
    return network


timm.models.register_model(vit_ics)
