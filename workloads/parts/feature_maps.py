"""What an encoder computes before it pools, and what the blocks of a residual network compute, ours or timm's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from workloads.models.maps import laid_out
from workloads.models.pooled_cnn import PooledCNN


def dense_features(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, H, W] -> the last maps [B, C, h, w], and what the encoder makes of them, [B, num_features].

    Args:
        encoder: a network of convolutions, or a transformer of patches.
        images: normalised.
    """
    model: Any = encoder
    x: Tensor = model.forward_features(images)
    pooled: Tensor = model.forward_head(x, pre_logits=True)
    return laid_out(model, x, images.shape[-2:]), pooled


def residual_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a residual network by depth.

    Raises:
        ValueError: it has none.
    """
    if isinstance(network, PooledCNN):
        blocks = network.residual_blocks()
    else:  # as timm's ResNets call their stages
        blocks = [block for i in range(1, 5) for block in getattr(network, f"layer{i}", ())]
    if not blocks:
        raise ValueError(
            f"got model {type(network).__name__}, expected one of residual blocks, whose maps can be compared; use "
            "resnet_cifar, wide_resnet, a network that a search found, or a ResNet of timm such as resnet18, for "
            "student and teacher"
        )
    return blocks


@contextlib.contextmanager
def tapped(network: nn.Module) -> Iterator[list[Tensor]]:
    """Within, a forward leaves here what each block gives, behind its last ReLU if it ends in one, [B, C, H, W].

    The hooks are on the blocks, outside of what the engine compiles and of what it computes again.
    """
    maps: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Any) -> None:
        maps.append(output[-1] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in residual_blocks(network)]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def map_shapes(network: nn.Module, size: int) -> list[torch.Size]:
    """(C, H, W) of each map for images of `size` pixels a side; nothing is computed."""
    probe = copy.deepcopy(network).to("meta").eval()
    with torch.no_grad(), tapped(probe) as maps:
        probe(torch.empty(1, 3, size, size, device="meta"))
    return [x.shape[1:] for x in maps]
