"""The last maps of any encoder, ours or timm's, for networks that are built on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def last_maps(encoder: nn.Module, images: Tensor) -> Tensor:
    """[B, 3, H, W] -> what the encoder computes before it pools, [B, C, h, w]."""
    model: Any = encoder
    return laid_out(model, model.forward_features(images), images.shape[-2:])


def laid_out(encoder: nn.Module, x: Tensor, size: Sequence[int]) -> Tensor:
    """What `forward_features` gives of images of that height and width, as maps [B, C, h, w].

    Tokens, of square patches, are laid out as the image is.
    """
    model: Any = encoder
    if x.ndim == 3:
        patches = x[:, model.num_prefix_tokens :].transpose(1, 2)
        return patches.unflatten(2, (round((patches.shape[2] * size[0] / size[1]) ** 0.5), -1))
    return x.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else x


def unread(network: nn.Module, output: Tensor) -> list[str]:
    """Names of trained parameters of `network` that `output` does not depend on, such as those behind its last maps.

    They would get no gradient, for which ranks wait: who trains by `output` alone freezes them.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(output.sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, found, strict=True) if gradient is None]
