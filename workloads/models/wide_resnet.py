"""Wide residual networks, WRN-d-k (Zagoruyko and Komodakis 2016, arXiv 1605.07146): `depth` d, `widen_factor` k.

Pre-activation blocks of two 3 x 3 convolutions in three stages of widths 16k, 32k, 64k on the full, half and quarter
resolution. Without the dropout that the paper tries between the convolutions.

The network is cut into blocks behind each ReLU rather than, as in the paper's table, before each BatchNorm. It
computes the same, and what comes out of a block's ReLU, which distillation looks at, is what the block returns.

Importing this module makes the architecture known to timm: after `import workloads.models.wide_resnet` an exported
folder loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from workloads.data.views import Size
from workloads.models.resnet_cifar import StagedCNN, conv3x3, expect_depth, three_stages
from workloads.models.timm_import import timm


class WideResNetConfig(BaseModel):
    """`{name: wide_resnet, depth: 40, widen_factor: 2}`; `image_size` only says what is fed in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: Size = 32
    depth: int = Field(default=28, ge=10)  # 6n + 4; WRN-28-10 is the paper's best
    widen_factor: int = Field(default=10, ge=1)

    @field_validator("depth")
    @classmethod
    def _of_three_stages(cls, depth: int) -> int:
        return expect_depth(depth, 4)

    def build(self) -> WideResNet:
        return WideResNet(self.depth, self.widen_factor)


class Stem(nn.Module):
    """[B, 3, H, W] -> the sum to which blocks add, [B, C, H, W], and the same normalised and behind a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = conv3x3(3, width), nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(images)
        return x, F.relu(self.norm(x))


class Block(nn.Module):
    """Two convolutions of what is behind the ReLU, added to the sum, which is normalised for the next block."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(width_in, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv3x3(width, width), nn.BatchNorm2d(width)
        changes = width != width_in or stride > 1
        self.shortcut = nn.Conv2d(width_in, width, kernel_size=1, stride=stride, bias=False) if changes else None

    def forward(self, x_and_active: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, active = x_and_active
        shortcut = x if self.shortcut is None else self.shortcut(active)
        x = shortcut + self.conv2(F.relu(self.norm1(self.conv1(active))))
        return x, F.relu(self.norm2(x))


class WideResNet(StagedCNN):
    """WRN-`depth`-`widen_factor`; the last part of each block's output is behind its ReLU."""

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 0) -> None:
        widths = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        stages = three_stages(Block, (depth - 4) // 6, widths)
        args = {"depth": depth, "widen_factor": widen_factor}
        super().__init__(Stem(16), stages, widths[-1], num_classes, architecture="wide_resnet", args=args)

    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward_features(images)[1]


def wide_resnet(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        WideResNet, "wide_resnet", pretrained, kwargs_filter=("in_chans", "global_pool"), **options
    )
    return network


timm.models.register_model(wide_resnet)
