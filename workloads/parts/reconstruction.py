"""Pixels as the target of masked modelling, the loss over hidden patches, and pictures of it."""

from __future__ import annotations

from torch import Tensor

from workloads.parts.patches import normalise_patches, patchify, unpatchify


def pixel_target(images: Tensor, p: int, *, norm_pix: bool) -> Tensor:
    """[B, 3, H, W] -> [B, L, p * p * 3], each patch by its own mean and variance where `norm_pix` says so."""
    patches = patchify(images, p)
    return normalise_patches(patches) if norm_pix else patches


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """The mean of [B, L, C] over channels and hidden patches; mask [B, L] is 1 where a patch is hidden.

    It is that of the micro-batch. Where the number of hidden patches varies (block-wise masks), the mean over
    micro-batches and ranks weighs each of these alike, not each patch.
    """
    return (error.mean(dim=-1) * mask).sum() / mask.sum()


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over hidden patches, in float32."""
    return masked_mean((pred.float() - target).square(), mask)


def hide(images: Tensor, mask: Tensor, p: int) -> Tensor:
    """[B, 3, H, W] with the patches grey (0 after normalisation) where mask [B, L] is 1."""
    return unpatchify(patchify(images, p) * (1 - mask[:, :, None]), p)


def filled_in(images: Tensor, pred: Tensor, mask: Tensor, p: int, *, norm_pix: bool) -> Tensor:
    """The images with hidden patches as predicted [B, L, p * p * 3], in the scale of the patch that was hidden."""
    patches, pred = patchify(images, p), pred.float()
    if norm_pix:
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    hidden = mask[:, :, None]
    return unpatchify(patches * (1 - hidden) + pred * hidden, p)


def pictures(images: Tensor, pred: Tensor, mask: Tensor, p: int, *, norm_pix: bool) -> dict[str, Tensor]:
    """`original`, `masked` (hidden patches grey), `reconstruction` (predicted where hidden, given where kept)."""
    return {
        "original": images,
        "masked": hide(images, mask, p),
        "reconstruction": filled_in(images, pred, mask, p, norm_pix=norm_pix),
    }
