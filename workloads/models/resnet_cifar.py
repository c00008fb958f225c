"""Residual networks for images of 32 x 32 pixels (He et al. 2016, arXiv 1512.03385, section 4.2): ResNet-20, -56, ...

A 3 x 3 convolution and three stages of widths 16, 32, 64; no early pooling, so a stage of 32 px works on 32, 16 and 8.
Shortcuts have no parameters where the resolution is halved (option A); the ResNets of many distillation
repositories have a convolution there.

Importing this module makes the architecture known to timm: after `import workloads.models.resnet_cifar` an exported
folder loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from workloads.data.views import Size
from workloads.models.pooled_cnn import PooledCNN
from workloads.models.timm_import import timm


class ResNetCifarConfig(BaseModel):
    """`{name: resnet_cifar, depth: 20}`; `image_size` only says what is fed in: the network takes any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: Size = 32
    depth: int = Field(default=20, ge=8)  # 6n + 2: 20, 32, 44, 56, 110 in table 6

    @field_validator("depth")
    @classmethod
    def _of_three_stages(cls, depth: int) -> int:
        return expect_depth(depth, 2)

    def build(self) -> ResNetCifar:
        return ResNetCifar(self.depth)


def expect_depth(depth: int, rest: int) -> int:
    """Three stages of n blocks of two layers each, and `rest` layers: 6n + rest."""
    if depth % 6 != rest:
        below = depth - (depth - rest) % 6
        raise ValueError(f"got depth={depth}, expected 6n + {rest}; use {below} or {below + 6}")
    return depth


def conv3x3(width_in: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, kernel_size=3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """relu(f(x) + x): where f halves the resolution, x is every second pixel and its new channels are 0."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(width_in, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.stride, self.new_channels = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(residual + shortcut)


class StagedCNN(PooledCNN):
    """A stem, and stages `layer1` to `layer3` of residual blocks."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Sequential],
        num_features: int,
        num_classes: int,
        *,
        architecture: str,
        args: dict[str, Any],
    ) -> None:
        super().__init__(num_features, architecture=architecture, args=args)
        self.stem = stem
        self.layer1, self.layer2, self.layer3 = stages
        self.finish(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the names of parameters by depth, for layer-wise decay: stem, blocks or stages, the rest."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def residual_blocks(self) -> list[nn.Module]:
        """Blocks by depth."""
        return [*self.layer1, *self.layer2, *self.layer3]

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last maps behind their ReLU, [B, num_features, H / 4, W / 4]."""
        return self.layer3(self.layer2(self.layer1(self.stem(images))))


def three_stages(block: Callable[[int, int, int], nn.Module], n: int, widths: Sequence[int]) -> list[nn.Sequential]:
    """Stages of n blocks; the second and the third begin by halving the resolution.

    Args:
        block: of (channels in, channels out, stride).
        n: blocks of a stage.
        widths: of the stem and of each stage.
    """
    return [
        nn.Sequential(*(block(width if i else width_in, width, 2 if stage and not i else 1) for i in range(n)))
        for stage, (width_in, width) in enumerate(pairwise(widths))
    ]


class ResNetCifar(StagedCNN):
    """ResNet-`depth`; each block's output is behind its last ReLU."""

    def __init__(self, depth: int, num_classes: int = 0) -> None:
        stem = nn.Sequential(conv3x3(3, 16), nn.BatchNorm2d(16), nn.ReLU())
        stages = three_stages(Block, (depth - 2) // 6, (16, 16, 32, 64))
        super().__init__(stem, stages, 64, num_classes, architecture="resnet_cifar", args={"depth": depth})


def resnet_cifar(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        ResNetCifar, "resnet_cifar", pretrained, kwargs_filter=("in_chans", "global_pool"), **options
    )
    return network


timm.models.register_model(resnet_cifar)
