"""What is tapped of residual networks, ours and timm's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workloads.models.architecture import parse
from workloads.models.binas import BinasConfig, published
from workloads.models.genet import GENetLight
from workloads.models.maedet import MAEDetConfig
from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.timm_import import timm
from workloads.models.vit import ViTConfig
from workloads.models.wide_resnet import WideResNet
from workloads.models.zennet import ZenNetConfig
from workloads.parts.feature_maps import dense_features, map_shapes, tapped


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
        (ZenNetConfig(structure="cifar-0.5M").build(), 28),
        (MAEDetConfig(structure="S").build(), 26),
        (GENetLight().build(), 14),
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


def test_maps_of_a_mobile_network_are_behind_no_relu() -> None:
    """Of inverted residuals and the separable convolution, not of the convolution behind them."""
    network = BinasConfig(structure="binas-a").build()
    with torch.no_grad(), tapped(network) as maps:
        network(torch.randn(2, 3, 32, 32))
    assert len(maps) == sum(len(stage) for stage in parse(published()["binas-a"])[:-1])
    assert all(x.min() < 0 for x in maps)


def test_hooks_are_gone_afterwards() -> None:
    network = ResNetCifar(8)
    with tapped(network) as maps:
        network(torch.randn(2, 3, 8, 8))
    network(torch.randn(2, 3, 8, 8))
    assert len(maps) == 3


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnetv2_50"])
def test_other_networks_are_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="expected one of residual blocks"):
        map_shapes(timm.create_model(name), 224)


SWIN = {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (ViTConfig(image_size=64, patch_size=16, dim=32, depth=1, heads=2).build(), (32, 4, 4)),
        (ResNetCifar(8), (64, 16, 16)),
        (timm.create_model("resnet18", num_classes=0), (512, 2, 2)),
        (timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **SWIN), (48, 8, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_maps_and_what_the_encoder_makes_of_them(network: nn.Module, shape: tuple[int, ...]) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps, pooled = dense_features(network.eval(), images)
        assert maps.shape == (2, *shape)
        assert torch.allclose(pooled, network(images), atol=1e-6)
        assert torch.allclose(maps.mean(dim=(2, 3)), pooled, atol=1e-5)


def test_a_map_of_patches_is_the_image_in_order() -> None:
    """A bright corner is bright where it was, in either direction."""
    network = ViTConfig(image_size=16, patch_size=4, dim=8, depth=1, heads=2).build().eval()
    network.pos_embed.data.zero_()
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, :4, 12:] = images[1, :, 12:, :4] = 1
    with torch.no_grad():
        maps, _ = dense_features(network, images)
    assert torch.allclose(maps[0], maps[1].mT, atol=1e-5)
    others = (maps[0] - maps[0, :, 3:, 3:]).norm(dim=0)
    assert others.argmax() == 3
