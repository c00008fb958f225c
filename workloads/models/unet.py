"""The 2-D U-Net of Chaitanya et al. 2020 (arXiv 2006.10511, section 4; after Ronneberger et al. 2015, 1505.04597).

Levels of two 3 x 3 convolutions with a 2 x 2 max-pool between them go down; blocks of the decoder go up again: the
map is doubled (nearest) and smoothed by a 2 x 2 convolution, the map of the level of that size is put beside it, and
two 3 x 3 convolutions follow. BatchNorm and ReLU are behind each of them, and no convolution has a bias, which
BatchNorm would take out again. The published one has six levels and a decoder of five blocks.

The network is as deep as it is asked to be: without a decoder it is an encoder as others are, with some blocks its
last maps are larger, and `Segmenter` completes it. Importing this module makes the architecture known to timm, see
`workloads.models.resnet_cifar`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from workloads.data.views import Size, height_width
from workloads.models.pooled_cnn import PooledCNN
from workloads.models.timm_import import timm

CHANNELS = (16, 32, 64, 128, 128, 128)  # of the paper's levels


class UNetConfig(BaseModel):
    """`{name: unet, image_size: 192}`.

    Attributes:
        image_size: of what is fed in; each level but the first halves it.
        channels: of each level; the blocks of the decoder have them in reverse.
        decoder_blocks: how many of the decoder's there are; 0: an encoder.
        in_chans: of its images; a network of 1 sees the mean of three.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: Size = 192
    channels: tuple[int, ...] = Field(default=CHANNELS, min_length=2)
    decoder_blocks: int = Field(default=0, ge=0)
    in_chans: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> UNetConfig:
        stride = 2 ** (len(self.channels) - 1)
        size = height_width(self.image_size)
        if any(side % stride for side in size):
            fits = [max(1, side // stride) * stride for side in size]
            raise ValueError(
                f"got image_size={self.image_size} for {len(self.channels)} levels, expected a multiple of {stride}; "
                f"use {fits[0] if isinstance(self.image_size, int) else fits}"
            )
        if self.decoder_blocks >= len(self.channels):
            raise ValueError(
                f"got decoder_blocks={self.decoder_blocks} for {len(self.channels)} levels, expected at most "
                f"{len(self.channels) - 1}, one for each level but the last"
            )
        return self

    def build(self) -> UNet:
        return UNet(self.channels, self.decoder_blocks, self.in_chans)


def conv(width_in: int, width: int, size: int = 3) -> nn.Sequential:
    """A convolution that keeps the resolution, BatchNorm, ReLU."""
    before, after = (size - 1) // 2, size // 2  # one of 2 x 2 looks right and down, as TensorFlow's do
    pad = nn.ZeroPad2d((before, after, before, after))
    return nn.Sequential(pad, nn.Conv2d(width_in, width, size, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Up(nn.Module):
    """A block of the decoder."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.smooth = conv(width_in, width, 2)
        self.convs = nn.Sequential(conv(2 * width, width), conv(width, width))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """[B, width_in, h, w] and the level's map [B, width, 2 h, 2 w] -> [B, width, 2 h, 2 w]."""
        x = self.smooth(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.convs(torch.cat([level, x], dim=1))


class UNet(PooledCNN):
    """Levels and the first blocks of a decoder; features are the mean of the last maps over all places.

    Attributes:
        levels: of the encoder, the finest first.
        decoder: its blocks, the coarsest first.
        channels: of each level.
        stride: pixels of a place of the coarsest map.
    """

    def __init__(
        self, channels: Sequence[int] = CHANNELS, decoder_blocks: int = 0, in_chans: int = 1, num_classes: int = 0
    ) -> None:
        args = {"channels": list(channels), "decoder_blocks": decoder_blocks, "in_chans": in_chans}
        super().__init__(channels[-1 - decoder_blocks], architecture="unet", args=args)
        self.channels, self.in_chans = tuple(channels), in_chans
        self.stride = 2 ** (len(channels) - 1)
        self.levels = nn.ModuleList(
            nn.Sequential(conv(width_in, width), conv(width, width))
            for width_in, width in pairwise((in_chans, *channels))
        )
        self.decoder = nn.ModuleList(self._block(i) for i in range(decoder_blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.reset_classifier(num_classes)

    def _block(self, i: int) -> Up:
        return Up(self.channels[-1 - i], self.channels[-2 - i])

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the names of parameters by depth, for layer-wise decay: levels, decoder, the rest."""
        return {"stem": r"^levels\.0", "levels": r"^levels\.(\d+)", "decoder": r"^decoder\.(\d+)"}

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> the last maps behind their ReLU, [B, num_features, h, w]."""
        x = images.mean(dim=1, keepdim=True) if self.in_chans == 1 else images
        maps = []
        for i, level in enumerate(self.levels):
            x = level(F.max_pool2d(x, 2) if i else x)
            maps.append(x)
        for i, up in enumerate(self.decoder):
            x = up(x, maps[-2 - i])
        return x


class Segmenter(nn.Module):
    """A whole U-Net that says the class of each pixel; blocks that the given one lacks and the last layer are fresh."""

    def __init__(self, network: UNet, classes: int) -> None:
        """The levels and blocks of `network` are trained on, not copied."""
        super().__init__()
        self.network = UNet(network.channels, len(network.channels) - 1, network.in_chans)
        self.network.levels = network.levels
        for i, up in enumerate(network.decoder):
            self.network.decoder[i] = up
        self.last = nn.Conv2d(network.channels[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes, H, W]."""
        return self.last(self.network.forward_features(images))


def unet(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        UNet, "unet", pretrained, kwargs_filter=("global_pool",), **options
    )
    return network


timm.models.register_model(unet)
