"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) in the form that MAE trains.

Ours rather than timm's, because masked methods need the steps of the forward apart
(`embed`, then tokens are dropped, then `encode`) and because importing timm costs
seconds that a job on a laptop feels. Parameter names and shapes are timm's, so an
exported folder loads with `timm.create_model` and gives the same features.

Shapes: B images, L = (H/p)(W/p) patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from workloads.data.views import Size, height_width


class ViTConfig(BaseModel):
    """A free size: `{name: vit, image_size: 32, patch_size: 8, dim: 96, depth: 3, heads: 4}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: Size = 224
    patch_size: int = Field(default=16, ge=1)
    dim: int = Field(default=768, ge=1)
    depth: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1)  # of the last block; earlier ones drop less

    architecture: ClassVar[str] = "vit_base_patch16_224"  # any plain ViT of timm: `timm_args` sets every size

    @model_validator(mode="after")
    def _divisible(self) -> ViTConfig:
        size, p = height_width(self.image_size), self.patch_size
        if any(side % p for side in size):
            fits = [max(1, side // p) * p for side in size]
            raise ValueError(
                f"got image_size={self.image_size} for patch_size={p}, expected a multiple; "
                f"use {fits[0] if isinstance(self.image_size, int) else fits}"
            )
        if self.dim % (4 * self.heads):
            raise ValueError(
                f"got dim={self.dim} for {self.heads} heads, expected a multiple of 4 * heads "
                f"(sin and cos of two axes); use {max(1, self.dim // (4 * self.heads)) * 4 * self.heads}"
            )
        return self

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = height_width(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def grid(self) -> int:
        """Patches in a row of a square image.

        Raises:
            ValueError: it is not square.
        """
        rows, columns = self.grid_shape
        if rows != columns:
            raise ValueError(f"got image_size={list(height_width(self.image_size))}, expected a square of patches")
        return rows

    def patch_embedding(self) -> PatchEmbed:
        """Images -> tokens, fresh."""
        return PatchEmbed(self.patch_size, self.dim)

    def build(self) -> ViT:
        return ViT(self, drop_path=self.drop_path_rate)


class ViTTiny(ViTConfig):
    dim: int = 192
    heads: int = 3


class ViTSmall(ViTConfig):
    dim: int = 384
    heads: int = 6


class ViTBase(ViTConfig):
    """768 / 12 / 12, patch 16."""


class ViTLarge(ViTConfig):
    dim: int = 1024
    depth: int = 24
    heads: int = 16


class ViTHuge(ViTConfig):
    patch_size: int = 14
    dim: int = 1280
    depth: int = 32
    heads: int = 16


def sincos_2d(dim: int, grid: int | tuple[int, int]) -> Tensor:
    """Fixed position table of MAE for patches in rows and columns, [1 + rows * columns, dim]; row 0 (CLS) is zero.

    The first half of the channels encodes the column x, the second the row y; each half is
    [sin(pos w_k)..., cos(pos w_k)...] with w_k = 10000^(-k / (d/2)), d the half's width.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    return _sincos_2d(dim, rows, columns).to(torch.get_default_device(), copy=True)


@lru_cache(maxsize=16)
def _sincos_2d(dim: int, rows: int, columns: int) -> Tensor:
    """Computed once: it was a quarter of what the check of a job costs, which builds networks on the meta device."""
    half = dim // 2
    with torch.device("cpu"):
        omega = 10000.0 ** -(torch.arange(half // 2, dtype=torch.float64) / (half / 2))
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        angles = [axis.flatten().double()[:, None] * omega for axis in (x, y)]  # 2 x [L, half/2]
        table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # [L, D]
        return torch.cat([torch.zeros(1, dim), table.float()])


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 x [B, h, S, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block; `drop_path` drops the residual branch of whole samples (stochastic depth)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def _residual(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
        return x * kept / (1 - self.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._residual(self.attn(self.norm1(x)))
        return x + self._residual(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int, *, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, 3, H, W] -> [B, L, D]


def init_transformer(module: nn.Module) -> None:
    """Linear xavier-uniform with zero bias, LayerNorm 1 and 0 (MAE, appendix A.1)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()


class ViT(nn.Module):
    """Encoder (`num_classes=0`): tokens are normalised, then pooled. Classifier: pooled, `fc_norm`, `head`.

    A classifier without `fc_norm` is an encoder with a head: what a linear probe makes.

    Attributes:
        pool: in the words of timm, the mean of the patch tokens without CLS ("avg"), or CLS ("token").
    """

    num_prefix_tokens: ClassVar[int] = 1  # CLS, by timm's name

    def __init__(
        self, config: ViTConfig, *, num_classes: int = 0, drop_path: float = 0.0, fc_norm: bool | None = None
    ) -> None:
        super().__init__()
        fc_norm = num_classes > 0 if fc_norm is None else fc_norm
        self.config, self.num_classes = config, num_classes
        self.pool: Literal["avg", "token"] = "avg"
        self.num_features = dim = config.dim
        self.patch_embed = config.patch_embedding()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, config.grid_shape)[None])  # [1, 1 + L, D]
        rates = torch.linspace(0, drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.mlp_ratio, rate) for rate in rates)
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if fc_norm else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_transformer(self)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> patch tokens with positions, [B, L, D]; those of images of another size are resized."""
        return self.patch_embed(images) + self._positions(*images.shape[-2:])

    def _positions(self, height: int, width: int) -> Tensor:
        """Of the patches of such images, [1, L, D]."""
        if (height, width) == height_width(self.config.image_size):
            return self.pos_embed[:, 1:]
        p = self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"got images of {height} x {width} pixels for patches of {p}, expected multiples of it")
        return resize_positions(self.pos_embed, self.config.grid_shape, (height // p, width // p))[:, 1:]

    def layers(self, tokens: Tensor) -> Iterator[Tensor]:
        """Any subset of embedded patch tokens [B, S, D] -> CLS and tokens after each block, [B, 1 + S, D].

        Before the last norm. A block is run when its output is asked for: who takes the first k pays for no deeper one.
        """
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls, tokens], dim=1)
        for block in self.blocks:
            x = block(x)
            yield x

    def encode(self, tokens: Tensor) -> Tensor:
        """Any subset of embedded patch tokens [B, S, D] -> CLS and tokens after the last norm, [B, 1 + S, D]."""
        for x in self.layers(tokens):
            last = x
        return self.norm(last)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.encode(self.embed(images))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` returns -> what `forward` does, or what its head sees."""
        pooled = tokens[:, 0] if self.pool == "token" else tokens[:, 1:].mean(dim=1)
        features = self.fc_norm(pooled)
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> pooled features [B, D], or logits [B, num_classes]."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The head, by timm's name."""
        return self.head

    def as_classifier(self, num_classes: int, drop_path: float = 0.0, *, fc_norm: bool = True) -> ViT:
        """The same weights and pooling under a fresh head, positions learnable; a fresh `fc_norm` replaces `norm`."""
        classifier = ViT(self.config, num_classes=num_classes, drop_path=drop_path, fc_norm=fc_norm)
        classifier.pool = self.pool
        own = classifier.state_dict()
        weights = {name: value for name, value in self.state_dict().items() if name in own}
        missing, _ = classifier.load_state_dict(weights, strict=False)
        assert all(name.startswith(("fc_norm.", "head.")) for name in missing)
        return classifier

    @property
    def architecture(self) -> str:
        """By timm's name."""
        return self.config.architecture

    def timm_args(self) -> dict[str, Any]:
        """Arguments with which timm builds the same network."""
        return {
            "img_size": self.config.image_size,
            "patch_size": self.config.patch_size,
            "embed_dim": self.config.dim,
            "depth": self.config.depth,
            "num_heads": self.config.heads,
            "mlp_ratio": self.config.mlp_ratio,
            "global_pool": self.pool,
            "fc_norm": isinstance(self.fc_norm, nn.LayerNorm),
        }


def plain_vit(encoder: nn.Module, why: str) -> ViT:
    """The encoder, if a method can take it apart.

    Raises:
        ValueError: it is none of ours.
    """
    if not isinstance(encoder, ViT):
        raise ValueError(
            f"got model {type(encoder).__name__}, expected a ViT: {why}; "
            "use model: {name: vit, ...} or a plain ViT of timm such as vit_base_patch16_224"
        )
    return encoder


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic resize of a position table [1, 1 + rows * columns, D] to other (rows, columns); CLS stays."""
    if old == new:
        return table
    cls, patches = table[:, :1], table[:, 1:]
    patches = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)
