"""Where a vision transformer looks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.models.vit import Attention, ViT


@torch.no_grad()
def cls_attention(vit: ViT, images: Tensor) -> Tensor:
    """[B, 3, H, W] -> the share of each patch in what CLS takes up in the last block, by head, [B, heads, L].

    The rest of 1 is what CLS keeps of itself.
    """
    last = vit.blocks[-1].attn
    assert isinstance(last, Attention)
    kept: list[Tensor] = []
    handle = last.qkv.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        vit.forward_features(images)
    finally:
        handle.remove()
    q, k, _ = kept[0].float().unflatten(-1, (3, last.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, h, 1 + L, d]
    scores = q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5  # [B, h, 1, 1 + L]
    return scores.softmax(dim=-1)[:, :, 0, 1:]


def attention_pictures(attention: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over heads of [B, heads, L] as brightness in [0, 1], [B, 3, H, W] of that size.

    The brightest patch of an image is white.
    """
    mean = attention.mean(dim=1)
    columns = round((mean.shape[1] * size[1] / size[0]) ** 0.5)
    bright = (mean / mean.amax(dim=1, keepdim=True)).view(len(mean), 1, -1, columns)
    return F.interpolate(bright, size=size, mode="nearest").expand(-1, 3, -1, -1)


def attended(encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Pictures of a method: the images, and of a ViT where its CLS looks, the mean over the heads of the last block."""
    if not isinstance(encoder, ViT):
        return {"image": images}
    height, width = images.shape[-2:]
    brightness = attention_pictures(cls_attention(encoder, images), (height, width))
    return {"image": images, "attention": 4 * brightness - 2}  # about the range of normalised pixels
