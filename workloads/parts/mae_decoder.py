"""The light decoder of MAE (He et al. 2022, section 3): visible tokens in, a prediction for every patch out."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from workloads.models.vit import Block, init_transformer, sincos_2d
from workloads.parts.masking import Mask, take


class DecoderConfig(BaseModel):
    """Fields of a method that decodes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoder_dim: int = Field(default=512, ge=4)  # MAE, table 1b
    decoder_depth: int = Field(default=8, ge=1)  # table 1a
    decoder_heads: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> DecoderConfig:
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"got decoder_dim={self.decoder_dim} with decoder_heads={self.decoder_heads}, expected decoder_dim "
                "to be a multiple of 4 and of decoder_heads; change one of them"
            )
        return self


class MAEDecoder(nn.Module):
    """`embed` maps the encoder's tokens to the decoder's width; `decode` does the rest.

    Shapes: B images, K visible of L patches, D and Dd the widths of encoder and decoder.
    """

    def __init__(self, config: DecoderConfig, dim: int, grid: int, outputs: int) -> None:
        """A decoder.

        Args:
            config: its sizes.
            dim: D.
            grid: patches in a row; L = grid * grid.
            outputs: numbers that are predicted for each patch.
        """
        super().__init__()
        width = config.decoder_dim
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_2d(width, grid)[None])  # [1, 1 + L, Dd]
        self.blocks = nn.ModuleList(Block(width, config.decoder_heads) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, outputs)
        init_transformer(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, tokens: Tensor, mask: Mask) -> Tensor:
        """Embedded CLS and visible tokens [B, 1 + K, Dd] -> predictions [B, L, outputs] in image order."""
        hidden = mask.ids_restore.shape[1] - mask.ids_keep.shape[1]
        mask_tokens = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], hidden, -1)
        patches = take(torch.cat([tokens[:, 1:], mask_tokens], dim=1), mask.ids_restore)  # [B, L, Dd]
        x = torch.cat([tokens[:, :1], patches], dim=1) + self.get_buffer("pos_embed")
        for block in self.blocks:
            x = block(x)
        predictions: Tensor = self.pred(self.norm(x))[:, 1:]
        return predictions

    def forward(self, latent: Tensor, mask: Mask) -> Tensor:
        """The encoder's CLS and visible tokens [B, 1 + K, D] -> [B, L, outputs]."""
        return self.decode(self.embed(latent), mask)
