"""What is tapped of residual networks, ours and timm's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.timm_import import timm
from workloads.models.wide_resnet import WideResNet
from workloads.parts.feature_maps import map_shapes, tapped


@pytest.mark.parametrize(
    ("network", "maps"),
    [
        (WideResNet(40, 2), 18),
        (WideResNet(28, 2), 12),
        (WideResNet(16, 2), 6),
        (ResNetCifar(20), 9),
        (ResNetCifar(56), 27),
        (timm.create_model("resnet18", num_classes=0), 8),
        (timm.create_model("resnet50", num_classes=0), 16),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_map_for_each_block(network: nn.Module, maps: int) -> None:
    before = {name: value.clone() for name, value in network.named_buffers()}
    shapes = map_shapes(network, 32)
    assert len(shapes) == maps
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    with torch.no_grad(), tapped(network) as tapped_maps:
        network(torch.randn(2, 3, 32, 32))
    assert [x.shape[1:] for x in tapped_maps] == shapes
    assert all(x.min() == 0 for x in tapped_maps)  # behind a ReLU


def test_hooks_are_gone_afterwards() -> None:
    network = ResNetCifar(8)
    with tapped(network) as maps:
        network(torch.randn(2, 3, 8, 8))
    network(torch.randn(2, 3, 8, 8))
    assert len(maps) == 3


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnetv2_50"])
def test_other_networks_are_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="expected one of residual stages"):
        map_shapes(timm.create_model(name), 224)
