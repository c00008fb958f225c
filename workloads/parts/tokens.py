"""Patch tokens of any transformer, ours or timm's: [B, L, D] in image order, without CLS and registers."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from workloads.models.vit import ViT


def grid_of(encoder: nn.Module) -> int:
    """Patches in a row of the images that the encoder is built for.

    Raises:
        ValueError: it does not cut images into patches.
    """
    if isinstance(encoder, ViT):
        return encoder.config.grid
    grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    if grid is None:
        raise ValueError(
            f"got model {type(encoder).__name__}, expected one that cuts images into patches; use a transformer, "
            "such as vit_base_patch16_224"
        )
    return int(grid[0])


def patch_size_of(encoder: nn.Module) -> int:
    """Pixels of a side of a patch."""
    patch: Any = encoder.config.patch_size if isinstance(encoder, ViT) else encoder.patch_embed.patch_size  # type: ignore[union-attr]
    return int(patch if isinstance(patch, int) else patch[0])


def patch_tokens(encoder: nn.Module, images: Tensor, *, norm: bool = True) -> Tensor:
    """[B, 3, H, W] -> [B, L, D] behind the last block.

    Args:
        encoder: ours, or a transformer of timm.
        images: normalised.
        norm: whether behind the final norm too; that of CLIP is its `ln_post`.
    """
    if isinstance(encoder, ViT):
        embedded = encoder.embed(images)
        tokens = encoder.encode(embedded) if norm else deque(encoder.layers(embedded), maxlen=1).pop()
        return tokens[:, 1:]
    model: Any = encoder
    if not norm:
        last: list[Tensor] = model.forward_intermediates(  # NCHW: all that Swin offers
            images, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return last[0].flatten(2).transpose(1, 2)
    x = model.forward_features(images)
    return x.flatten(1, 2) if x.ndim == 4 else x[:, model.num_prefix_tokens :]  # Swin: [B, h, w, D]


@contextlib.contextmanager
def hidden_patches(encoder: nn.Module, mask: Tensor, token: Tensor) -> Iterator[None]:
    """Within, hidden patches enter the encoder as a learned token: embedded, before positions are added.

    Args:
        encoder: any with `patch_embed`, ours or timm's.
        mask: [B, L], 1 or True where a patch is hidden.
        token: [1, 1, D], learned.
    """

    def replace(_: nn.Module, __: object, tokens: Tensor) -> Tensor:
        hidden = mask.bool().reshape(*tokens.shape[:-1], 1)  # [B, L, 1], of Swin [B, h, w, 1]
        return token.to(tokens.dtype).view(-1).where(hidden, tokens)

    handle = encoder.patch_embed.register_forward_hook(replace)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()
