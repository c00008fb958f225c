"""Images as sequences of patches, and back."""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, p: int) -> Tensor:
    """[B, C, H, W] -> [B, L, p * p * C]; the order inside a patch is (row, column, channel), as in MAE's weights."""
    B, C, H, W = images.shape
    h, w = H // p, W // p
    x = images.reshape(B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, p * p * C)


def unpatchify(patches: Tensor, p: int, channels: int = 3) -> Tensor:
    """Inverse of `patchify` for square images: [B, L, p * p * C] -> [B, C, H, W]."""
    B, L, _ = patches.shape
    h = w = round(L**0.5)
    x = patches.reshape(B, h, w, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, channels, h * p, w * p)


def normalise_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Each patch by its own mean and variance (unbiased, eps inside the root): MAE's `norm_pix` target."""
    mean = patches.mean(dim=-1, keepdim=True)
    var = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + eps).sqrt()
