"""The last maps of any encoder, ours or timm's, for networks that are built on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def last_maps(encoder: nn.Module, images: Tensor) -> Tensor:
    """[B, 3, H, W] -> what the encoder computes before it pools, [B, C, h, w]; tokens are laid out as the image is."""
    model: Any = encoder
    x: Tensor = model.forward_features(images)
    if x.ndim == 3:  # tokens of square patches
        patches = x[:, model.num_prefix_tokens :].transpose(1, 2)
        height, width = images.shape[-2:]
        return patches.unflatten(2, (round((patches.shape[2] * height / width) ** 0.5), -1))
    return x.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else x


def unread(network: nn.Module, output: Tensor) -> list[str]:
    """Names of trained parameters of `network` that `output` does not depend on, such as those behind its last maps.

    They would get no gradient, for which ranks wait: who trains by `output` alone freezes them.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output.sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, found, strict=True) if gradient is None]
