"""A Swin transformer that is told how much semantics its features shall hold (SOLIDER, Chen et al. 2023).

arXiv 2303.17602. Swin (Liu et al. 2021, arXiv 2103.14030) is timm's. A number lambda of each image, 1 for semantics
and 0 for appearance, scales and shifts the channels of what leaves a stage, behind the merging of patches, with which
timm begins the next stage. What leaves the last stage is left alone: SOLIDER takes its features before that modulation,
so its fourth pair of layers changes nothing, gets no gradient, which DDP would wait for, and is not built.

Who uses the weights chooses lambda; the authors took 0.2 to tell persons apart and 1 to detect them:

- in a job `model: {name: swin_semantic, semantic_weight: 0.9, ...}` with `init:` naming the artifact; it holds for
  fine-tuning, for evaluations, and for what the job registers and serves;
- of a folder `timm.create_model("local-dir:FOLDER", pretrained=True, semantic_weight=0.9)`, after this module was
  imported, which makes the architecture known to timm;
- of a network `network.semantic_weight = 0.9`, or for each image `network(images, torch.tensor([0.2, 0.9]))`.

Images of any size are taken. As in SOLIDER, windows keep their size where a map is smaller, and maps are filled up with
zeros before they are shifted: timm does it behind, where the top of an image would then see its bottom.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from workloads.data.views import Size, height_width
from workloads.models.timm_import import timm

SwinTransformer: Any = timm.models.swin_transformer.SwinTransformer
SwinTransformerBlock: Any = timm.models.swin_transformer.SwinTransformerBlock

SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swin_small_patch4_window7_224": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "swin_base_patch4_window7_224": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
"""Table 7 of Liu et al., by timm's names."""


class SwinSemanticConfig(BaseModel):
    """`{name: swin_semantic, architecture: swin_small_patch4_window7_224, semantic_weight: 0.2}`.

    Attributes:
        architecture: whose sizes are taken.
        image_size: of the images; the network takes any.
        semantic_weight: lambda where a call gives none; 0, which the released class has, is all appearance.
        drop_path_rate: of the last block; earlier ones drop less.
        patch_size, window_size, embed_dim, depths, num_heads: in place of those of the architecture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal[
        "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"
    ] = "swin_tiny_patch4_window7_224"
    image_size: Size = (256, 128)
    semantic_weight: float = Field(default=0.0, ge=0, le=1)
    drop_path_rate: float = Field(default=0.1, ge=0, lt=1)
    patch_size: int = Field(default=4, ge=1)
    window_size: int = Field(default=7, ge=1)
    embed_dim: int | None = Field(default=None, ge=1)
    depths: tuple[int, ...] | None = None
    num_heads: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> SwinSemanticConfig:
        size, sizes = height_width(self.image_size), self._sizes()
        if any(side % self.patch_size for side in size):
            fits = [max(1, side // self.patch_size) * self.patch_size for side in size]
            raise ValueError(f"got image_size={list(size)} for patch_size={self.patch_size}, expected {fits}")
        depths, heads, width = list(sizes["depths"]), list(sizes["num_heads"]), sizes["embed_dim"]
        if len(depths) < 2 or len(heads) != len(depths) or min(depths + heads) < 1:
            raise ValueError(
                f"got depths={depths} and num_heads={heads}, expected a number for each of 2 or more stages"
            )
        if wrong := [h for i, h in enumerate(heads) if width * 2**i % h]:
            raise ValueError(
                f"got num_heads={heads}, of which {wrong} do not divide embed_dim={width}, doubled each stage"
            )
        return self

    def _sizes(self) -> dict[str, Any]:
        given = {"embed_dim": self.embed_dim, "depths": self.depths, "num_heads": self.num_heads}
        return SIZES[self.architecture] | {name: value for name, value in given.items() if value is not None}

    def build(self) -> SwinSemantic:
        args = self._sizes() | {
            "img_size": height_width(self.image_size),
            "patch_size": self.patch_size,
            "window_size": self.window_size,
            "drop_path_rate": self.drop_path_rate,
            "semantic_weight": self.semantic_weight,
        }
        network = SwinSemantic(**args, num_classes=0)
        network.manta_args = args
        return network


class Controller(nn.Module):
    """x * softplus(W s + b) + (V s + d), s = [lambda, 1 - lambda]: of each channel, the same at all places."""

    def __init__(self, channels: int, semantic_weight: float) -> None:
        super().__init__()
        self.semantic_weight = semantic_weight
        self.scale, self.shift = nn.Linear(2, channels), nn.Linear(2, channels)
        for layer in (self.scale, self.shift):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[B, H, W, C] and lambda [B] -> [B, H, W, C]."""
        if weight is None:
            weight = x.new_full((len(x),), self.semantic_weight)
        s = torch.stack([weight, 1 - weight], dim=1).to(self.scale.weight.dtype)
        return x * F.softplus(self.scale(s))[:, None, None] + self.shift(s)[:, None, None]


class Block(SwinTransformerBlock):  # type: ignore[misc]
    def _attn(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        h, w = self.window_size
        filled = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))  # now there is nothing to fill up behind the shift
        return super()._attn(filled)[:, :H, :W]


class Stage(nn.Module):
    """A stage of timm's behind the first: patches are merged, what leaves that is modulated, then come the blocks."""

    def __init__(self, stage: Any, semantic_weight: float) -> None:
        super().__init__()
        self.downsample = stage.downsample
        self.controller = Controller(stage.downsample.out_dim, semantic_weight)
        self.blocks = stage.blocks

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[B, H, W, C] and lambda [B] -> [B, H / 2, W / 2, 2 C]."""
        return self.blocks(self.controller(self.downsample(x), weight))


class SwinSemantic(SwinTransformer):  # type: ignore[misc]
    """timm's Swin of `sizes` with a controller behind each stage but the last.

    Attributes:
        manta_args: arguments with which timm builds the same network.
    """

    layers: Any

    def __init__(self, semantic_weight: float = 0.0, **sizes: Any) -> None:
        super().__init__(**sizes, strict_img_size=False, always_partition=True)
        self.default_cfg: dict[str, Any] = {"architecture": "swin_semantic"}
        self.manta_args: dict[str, Any] = {}
        first, *others = self.layers
        self.layers = nn.Sequential(first, *(Stage(stage, semantic_weight) for stage in others))
        for part in self.modules():
            if type(part) is SwinTransformerBlock:  # the stages of timm know no other
                part.__class__ = Block

    @property
    def semantic_weight(self) -> float:
        """Lambda where a call gives none."""
        return float(self.layers[1].controller.semantic_weight)

    @semantic_weight.setter
    def semantic_weight(self, value: float) -> None:
        for stage in self.layers[1:]:
            stage.controller.semantic_weight = value

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the names of parameters by depth, for layer-wise decay; a controller begins its stage."""
        matcher: dict[str, Any] = super().group_matcher(coarse)
        if not coarse:
            matcher["blocks"][0] = (r"^layers\.(\d+)\.(?:downsample|controller)", (0,))
        return matcher

    def forward_features(self, images: Tensor, weight: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] and lambda [B] -> the last maps behind their norm, [B, h, w, num_features]."""
        first, *others = self.layers
        x = first(self.patch_embed(images))
        for stage in others:
            x = stage(x, weight)
        return self.norm(x)

    def forward(self, images: Tensor, weight: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] and lambda [B] -> features [B, num_features], the mean of the map, or logits."""
        return self.forward_head(self.forward_features(images, weight))


def swin_semantic(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(SwinSemantic, "swin_semantic", pretrained, **options)
    return network


timm.models.register_model(swin_semantic)
